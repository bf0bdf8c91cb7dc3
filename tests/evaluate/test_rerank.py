"""Re-ranking with a real fusion encoder: every pair once and as a plain forward scores it, in bounded memory, alike on
one rank and on two; and what is refused."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from tests.forked import server
from tests.fused import SCENES, save_fused
from vlscale.cli import main
from vlscale.data.images import ImageSpec, decode_eval, normalise
from vlscale.data.samples import read_samples
from vlscale.data.tokens import tokenise
from vlscale.distributed import Ranks
from vlscale.evaluate import scoring
from vlscale.evaluate.embed import EmbeddedCorpus, Preprocess, embed_corpus
from vlscale.evaluate.protocols import evaluate_corpus
from vlscale.evaluate.rerank import pair_codes, rerank_corpus
from vlscale.evaluate.run import EvalRequest, evaluate_model
from vlscale.models.hf_folder import load_encoder

K = 7


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fused") / "final"
    save_fused(folder, [f"{corpus}/val-*.tar"])
    return folder


@pytest.fixture(scope="module")
def urls(corpus) -> list[str]:
    return [f"{corpus}/val-*.tar"]


def reading(folder: Path, urls: list[str]):
    encoder, tokenizer, processor = load_encoder(str(folder))
    return encoder, urls, SCENES, Preprocess(ImageSpec.from_processor(processor), tokenizer, 24)


def reranked(folder: Path, urls: list[str], ranks: Ranks, batch_size: int = 16, **how) -> EmbeddedCorpus:
    encoder, *rest = reading(folder, urls)
    corpus = embed_corpus(encoder, *rest, batch_size=batch_size, ranks=ranks)
    how = {"k": K, "progress": False} | how
    return rerank_corpus(encoder, corpus, *rest, batch_size=batch_size, ranks=ranks, **how)


@pytest.fixture(scope="module")
def whole(folder, urls) -> EmbeddedCorpus:
    return reranked(folder, urls, Ranks())


def test_every_logit_is_that_of_a_plain_forward_of_its_pair(folder, urls, whole):
    encoder, _, _, preprocess = reading(folder, urls)
    pictures = [sample.image for sample in read_samples(urls, SCENES)]

    def plain(image: int, caption: int) -> torch.Tensor:
        pixels = torch.from_numpy(decode_eval(pictures[image], preprocess.spec)).permute(2, 0, 1)[None]
        ids, mask = tokenise(preprocess.tokenizer, [whole.captions[caption]], 24)
        with torch.no_grad():
            _, seen = encoder.image_tokens(normalise(pixels, preprocess.spec))
            _, text = encoder.text_tokens(ids, mask)
            return encoder.fusion.matching(encoder.fusion(text, mask, seen)[:, 0])[0]

    i2t, t2i = whole.reranked.i2t, whole.reranked.t2i
    assert i2t.items.shape == (len(whole.keys), K) and t2i.items.shape == (len(whole.captions), K)
    for row, place in ((0, 0), (5, 3), (62, 6), (31, 1)):
        torch.testing.assert_close(i2t.logits[row, place], plain(row, int(i2t.items[row, place])), rtol=0, atol=2e-5)
    for row, place in ((0, 6), (100, 2), (len(whole.captions) - 1, 0)):
        torch.testing.assert_close(t2i.logits[row, place], plain(int(t2i.items[row, place]), row), rtol=0, atol=2e-5)
    assert i2t.log_odds.std() > 0.01


def test_each_pair_is_scored_once_and_a_small_window_changes_nothing(folder, urls, whole, monkeypatch):
    """Captions in a window of a few: they are encoded again for each batch of pictures, the pairs still scored once."""
    scored, match = [], scoring.match_read

    def counted(fusion, text, mask, picture):
        scored.append(len(text))
        return match(fusion, text, mask, picture)

    monkeypatch.setattr(scoring, "match_read", counted)
    small = reranked(folder, urls, Ranks(), window_bytes=32 * 4 * 400)
    both = small.reranked
    assert sum(scored) == both.pairs == len(pair_codes(both.i2t.items, both.t2i.items))
    assert both.pairs < K * (len(small.keys) + len(small.captions))  # both directions ask for many
    assert max(scored) <= 16
    for side in ("i2t", "t2i"):
        one, other = getattr(whole.reranked, side), getattr(both, side)
        assert torch.equal(one.items, other.items)
        torch.testing.assert_close(one.logits, other.logits, rtol=0, atol=2e-5)


def on_rank(rank: int, folder: str, urls: list[str], out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
    found = reranked(Path(folder), urls, Ranks(rank, 2, group=dist.group.WORLD), batch_size=9)
    torch.save(dataclasses.asdict(found.reranked), f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_find_what_one_does(folder, urls, whole, tmp_path):
    """63 pictures, in batches of 9 and unevenly many: the ranks stay in step and agree."""
    server()
    multiprocessing.start_processes(on_rank, (str(folder), urls, str(tmp_path)), nprocs=2, start_method="forkserver")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for side in ("i2t", "t2i"):
        alone = getattr(whole.reranked, side)
        assert torch.equal(first[side]["logits"], second[side]["logits"])
        assert torch.equal(first[side]["items"], alone.items)
        torch.testing.assert_close(first[side]["logits"], alone.logits, rtol=0, atol=2e-5)
    assert first["pairs"] == whole.reranked.pairs


def test_the_command_adds_a_row(folder, urls, whole, tmp_path, capsys):
    given = ["eval", str(folder), "--data", urls[0], "--caption-key", "json:captions", "--protocol", "pairs"]
    main_ends([*given, "--rerank", str(K), "--json", str(tmp_path / "e.json")], code=0)
    shown = capsys.readouterr().out
    assert f"final, re-ranked {K} " in shown and "pairs scored, each once" in shown
    _, result = evaluate_model(EvalRequest(str(folder), urls, "pairs", caption_key="json:captions", rerank=K))
    by_hand = evaluate_corpus(whole, "pairs")
    assert result["reranked:rsum"].value == pytest.approx(by_hand["reranked:rsum"].value, abs=0.5)


def main_ends(words: list[str], code: int) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert (ended.value.code or 0) == code


def test_more_candidates_than_the_gallery_has_are_refused(folder, urls, capsys):
    given = ["eval", str(folder), "--data", urls[0], "--caption-key", "json:captions", "--rerank", "64"]
    main_ends(given, code=2)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "re-ranking 64 candidates: expected 1 to 63, for a gallery has 63 pictures and" in error


def test_a_dual_encoder_alone_is_refused_before_anything_is_embedded(folder, urls, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "final", ignore=shutil.ignore_patterns("fusion"))
    main_ends(["eval", str(tmp_path / "final"), "--data", "/nowhere/*.tar", "--rerank", "5"], code=2)
    assert "--rerank 5 needs a model with a fusion encoder" in capsys.readouterr().err


def test_scores_that_are_no_numbers_are_refused(folder, urls):
    encoder, *rest = reading(folder, urls)
    corpus = embed_corpus(encoder, *rest, batch_size=32, ranks=Ranks())
    torch.nn.init.constant_(encoder.fusion.matching.bias, torch.nan)
    with pytest.raises(ValueError, match=r"matching scores are not finite: the fusion encoder diverged"):
        rerank_corpus(encoder, corpus, *rest, k=2, batch_size=32, ranks=Ranks(), progress=False)


def test_a_picture_that_is_gone_the_second_time_is_told(folder, urls, corpus):
    encoder, *rest = reading(folder, urls)
    embedded = embed_corpus(encoder, *rest, batch_size=32, ranks=Ranks())
    rest[0] = [f"{corpus}/train-000000.tar"]
    with pytest.raises(ValueError, match=r"63 pictures that were embedded could not be read a second time"):
        rerank_corpus(encoder, embedded, *rest, k=2, batch_size=32, ranks=Ranks(), progress=False)
