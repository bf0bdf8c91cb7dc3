"""Two runs on one small synthetic corpus, with made-up embeddings: true scene likeness plus noise.

The second run's captions are less noisy than the first's and its pictures a little more, so that searches by caption
get better and those among pictures get worse.
"""

import pytest
import torch
from torch.nn.functional import normalize

from vlscale.data.scenes import scene_relevance
from vlscale.data.synth import make_sample, synth_config
from vlscale.evaluate import EmbeddedCorpus, evaluate_corpus
from vlscale.report import RunReport

SCENES = 120
HOSTILE = "<script>alert('caption')</script> & \"quoted\""


def embedded(samples: list[dict], image_noise: float, text_noise: float, seed: int) -> EmbeddedCorpus:
    metas = [sample["json"] for sample in samples]
    captions = [caption for meta in metas for caption in meta["captions"]]
    text_image = torch.tensor([place for place, meta in enumerate(metas) for _ in meta["captions"]])
    scenes = [meta["scene"] for meta in metas]
    values, vectors = torch.linalg.eigh(torch.as_tensor(scene_relevance(scenes, scenes)).double())
    truth = (vectors * values.clamp(min=0).sqrt()).float()[:, -64:]
    truth = normalize(truth - 0.9 * truth.mean(0), dim=1)
    generator = torch.Generator().manual_seed(seed)

    def noisy(rows: torch.Tensor, noise: float) -> torch.Tensor:
        return normalize(rows + noise * torch.randn(rows.shape, generator=generator) / 8, dim=1)

    return EmbeddedCorpus(
        keys=[sample["__key__"] for sample in samples],
        image_emb=noisy(truth, image_noise),
        text_emb=noisy(truth[text_image], text_noise),
        text_image=text_image,
        captions=[HOSTILE, *captions[1:]],
        meta=metas,
    )


def teacher(runs: list[RunReport]) -> EmbeddedCorpus:
    """A teacher that knows more of the truth than the runs do."""
    samples = [
        {"__key__": key, "json": meta} for key, meta in zip(runs[0].corpus.keys, runs[0].corpus.meta, strict=True)
    ]
    return embedded(samples, 0.8, 0.8, seed=9)


def curve(steps: int, floor: float, relations: bool) -> list[dict]:
    generator = torch.Generator().manual_seed(steps + relations)
    noise = torch.randn(steps, generator=generator).tolist()
    lines = []
    for step in range(1, steps + 1):
        contrastive = floor + 4.5 * (1 - step / steps) ** 2 + 0.08 * noise[step - 1]
        line = {
            "step": step,
            "loss": contrastive,
            "contrastive": contrastive,
            "logit_scale": 14.0 + step / 20,
            "lr": 1e-3 * min(1, step / 20),
        }
        if relations:
            line |= {"loss": contrastive + 0.06, "relation_image": 0.4 / step**0.3, "relation_text": 0.5 / step**0.2}
        lines.append(line | {"samples": step * 256, "seconds": 0.25 + 0.02 * abs(noise[step - 1])})
    return lines


def two_runs(folder) -> list[RunReport]:
    config = synth_config(resolution=48)
    samples = [make_sample(config, "val", index) for index in range(SCENES)]
    pictures = {sample["__key__"]: sample["jpg"] for sample in samples}
    runs = []
    for name, image_noise, text_noise, relations in [
        ("contrastive only", 1.0, 2.2, False),
        ("contrastive + relations", 1.15, 1.5, True),
    ]:
        corpus = embedded(samples, image_noise, text_noise, seed=int(relations))
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.yaml").write_text("train:\n  seed: 0\n  note: '<b>not bold</b>'\n")
        result = evaluate_corpus(corpus, bootstrap=200)
        runs.append(RunReport(name, folder / name, curve(200, 1.0, relations), result, corpus, pictures))
    return runs


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> list[RunReport]:
    return two_runs(tmp_path_factory.mktemp("runs"))
