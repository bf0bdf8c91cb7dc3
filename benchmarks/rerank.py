"""Re-ranking at Flickr30K's size against one query a forward, as the papers' official evaluation does it.

    vlscale bench rerank [--rounds 3] [--pictures 2] [--write]

Both answer the same question: the k=128 nearest of each of 1,000 pictures and 5,000 captions, both ways, matched.
- official: for each query one forward over its k candidates, the query's tokens repeated, captions padded to 40;
- vlscale: `PairScorer`, which scores each pair once, captions of alike length together, without padding beyond them,
  each picture's keys and values made once (`vlscale.models.match_picture`); its encoding of both is counted.

ViT-B/16 at 224 pixels (197 tokens) and BERT-base, six layers a tower and six of fusion, random weights: time does not
depend on them. A sample is timed, in rounds of both: forwards of a few queries, all pairs of a few pictures; a run over
everything would take hours on two cores. Lengths of captions are drawn with Flickr30K's mean, about 16 tokens.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "setup.py").is_file():
    sys.path.insert(0, str(ROOT))
sys.path.append(str(Path(__file__).resolve().parent))

from common import RESULTS, provenance, today  # noqa: E402

from vlscale.data.images import ImageSpec  # noqa: E402
from vlscale.data.tokens import tokenise, train_tokenizer  # noqa: E402
from vlscale.distributed import Ranks  # noqa: E402
from vlscale.evaluate.embed import EmbeddedCorpus, Preprocess  # noqa: E402
from vlscale.evaluate.rerank import nearest_both_ways, pair_codes, pairs_of  # noqa: E402
from vlscale.evaluate.scoring import CaptionWindow, PairScorer  # noqa: E402
from vlscale.models.dual_encoder import build_dual_encoder  # noqa: E402
from vlscale.sections import ModelConfig  # noqa: E402

IMAGES, CAPTIONS_EACH, K = 1000, 5, 128
PADDED, LENGTH = 40, 16  # tokens that the official code pads to; tokens of a caption, on average
WIDTH, SIDE, PATCH, FUSION_LAYERS = 768, 224, 16, 6
TOWER = {"hidden_size": WIDTH, "num_attention_heads": 12, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 12}
MODEL = {
    "embed_dim": 256,
    "dropout": 0.0,
    "vision": {"config": {"model_type": "vit", "image_size": SIDE, "patch_size": PATCH, **TOWER}},
    "text": {"config": {"model_type": "bert", "vocab_size": 300, **TOWER}},
    "fusion": {"source": "text", "layers": FUSION_LAYERS},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=2, help="whose pairs a round scores")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    torch.manual_seed(0)
    corpus = make_corpus()
    i2t, t2i = nearest_both_ways(corpus, K, [slice(0, IMAGES)], Ranks())
    wanted, asked = pair_codes(i2t, t2i), (len(i2t) + len(t2i)) * K
    tokens = 1 + (SIDE // PATCH) ** 2
    predicted = operations(PADDED, tokens) / operations_here(LENGTH) * asked / len(wanted)
    print(f"predicted from the operations: {predicted:.1f} times", file=sys.stderr)
    model = build_dual_encoder(ModelConfig.model_validate(MODEL)).eval()
    tokenizer = train_tokenizer(corpus.captions, 300, PADDED)
    spec = ImageSpec(SIDE, (0.5,) * 3, (0.5,) * 3, 3)
    preprocess = Preprocess(spec, tokenizer, PADDED)
    scorer = PairScorer(CaptionWindow(model, corpus.captions, preprocess, Ranks(), batch_size=256))
    rounds = [measure(scorer, corpus, i2t, turn, given.pictures, wanted) for turn in range(given.rounds)]
    page, facts = summary(rounds, asked, len(wanted), predicted, given)
    print(page)
    if given.write:
        (RESULTS / f"{today()}-rerank.md").write_text(page)
        (RESULTS / f"{today()}-rerank.json").write_text(json.dumps(facts, indent=1) + "\n")


def operations(length: float, vision: int) -> float:
    """Multiply-adds of a pair in all fusion layers, in WIDTH^2, by a forward over repeated tokens."""
    return FUSION_LAYERS * (14 * length + 2 * vision)


def operations_here(length: float) -> float:
    """The same by `match_picture`, but for keys and values that hundreds of captions share."""
    return (FUSION_LAYERS - 1) * 14 * length + 10


def make_corpus() -> EmbeddedCorpus:
    """Embeddings of pictures in a hundred loose groups, captions near theirs; captions as long as Flickr30K's."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    truth = noise(100, 256)[torch.randint(100, (IMAGES,), generator=generator)] + noise(IMAGES, 256)
    owner = torch.arange(IMAGES).repeat_interleave(CAPTIONS_EACH)
    words = (LENGTH - 2 + 4.5 * noise(len(owner))).round().clamp(5, PADDED - 2).long().tolist()
    return EmbeddedCorpus(
        keys=[str(place) for place in range(IMAGES)],
        image_emb=normalize(truth + 0.7 * noise(IMAGES, 256)),
        text_emb=normalize(truth[owner] + 1.2 * noise(len(owner), 256)),
        text_image=owner,
        captions=[" ".join("abcdefghij"[(place + word) % 10] for word in range(n)) for place, n in enumerate(words)],
        meta=[{}] * IMAGES,
    )


@torch.no_grad()
def measure(scorer: PairScorer, corpus: EmbeddedCorpus, i2t: Tensor, turn: int, pictures: int, wanted: Tensor):
    """Seconds of this round: a pair either way, and encoding a picture and a caption."""
    found: dict[str, float] = {}
    model = scorer.model
    pixels = torch.randn(pictures, 3, SIDE, SIDE)
    started = time.perf_counter()
    _, seen = model.image_tokens(pixels)
    found["picture"] = (time.perf_counter() - started) / pictures
    for name, captions in (("official i2t", i2t[turn]), ("official t2i", torch.full((K,), turn))):
        text, mask = padded_tokens(scorer, corpus, captions)
        started = time.perf_counter()
        vision = seen[:1].repeat(K, 1, 1)  # of a caption's candidates these differ, at the same cost
        model.fusion.matching(model.fusion(text, mask, vision)[:, 0])
        found[name] = (time.perf_counter() - started) / K
    rows = torch.arange(pictures) * (IMAGES // pictures) + turn
    whose, codes = pairs_of(rows, wanted, len(corpus.captions))
    captions = codes % len(corpus.captions)
    (run,) = scorer.window.runs(captions.unique())
    missing = len(scorer.window.missing(run))
    started = time.perf_counter()
    scorer.window.hold(run)
    if missing:
        found["caption"] = (time.perf_counter() - started) / missing
    started = time.perf_counter()
    scorer.score(seen, whose, captions)
    found["pair"] = (time.perf_counter() - started) / len(codes)
    return found


def padded_tokens(scorer: PairScorer, corpus: EmbeddedCorpus, captions: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and mask (K, PADDED, WIDTH) as the official code keeps them; what is masked costs as much."""
    tokenizer = scorer.window.preprocess.tokenizer
    ids, mask = tokenise(tokenizer, [corpus.captions[row] for row in captions.tolist()], PADDED)
    _, tokens = scorer.model.text_tokens(ids, mask)
    missing = PADDED - ids.shape[1]
    return torch.nn.functional.pad(tokens, (0, 0, 0, missing)), torch.nn.functional.pad(mask, (0, missing))


def summary(rounds: list[dict], asked: int, scored: int, predicted: float, given: argparse.Namespace):
    """The page, and its facts."""

    def median(name: str) -> float:
        return statistics.median(each[name] for each in rounds if name in each)

    captions = IMAGES * CAPTIONS_EACH
    encoding = IMAGES * median("picture") + captions * median("caption")
    ratios = []
    for each in rounds:
        official = (IMAGES * each["official i2t"] + captions * each["official t2i"]) * K
        ratios.append(official / (scored * each["pair"] + encoding))
    official = (IMAGES * median("official i2t") + captions * median("official t2i")) * K
    ours = scored * median("pair") + encoding
    facts = {
        "asked": asked, "scored": scored, "predicted": predicted, "times": statistics.median(ratios), "rounds": rounds,
        "official_hours": official / 3600, "hours": ours / 3600, "threads": torch.get_num_threads(),
    }  # fmt: skip
    lines = [
        f"# Re-ranking, {today()}",
        "",
        provenance(f"vlscale bench rerank --rounds {given.rounds} --pictures {given.pictures} --write"),
        "",
        f"{IMAGES:,} pictures, {captions:,} captions, k = {K}: {asked:,} candidates asked for, {scored:,} different "
        f"pairs. ViT-B/16 at {SIDE} px, BERT-base in two halves, float32, {torch.get_num_threads()} threads. "
        f"Extrapolated from {len(rounds)} rounds of two official forwards and all pairs of {given.pictures} pictures.",
        "",
        "| | seconds a thousand candidates | the whole corpus, hours |",
        "| --- | ---: | ---: |",
        f"| one query a forward | {1000 * official / asked:.2f} | {official / 3600:.2f} |",
        f"| vlscale, its encoding of pictures and captions counted | {1000 * ours / asked:.2f} | {ours / 3600:.2f} |",
        "",
        f"{facts['times']:.1f} times faster (rounds: {min(ratios):.1f} to {max(ratios):.1f}; asked for: 5); predicted "
        f"from the operations: {predicted:.1f}, of which {asked / scored:.2f} by scoring each pair once. Encoding is "
        f"{100 * encoding / ours:.0f} % of the time.",
    ]
    return "\n".join(lines) + "\n", facts


if __name__ == "__main__":
    main()
