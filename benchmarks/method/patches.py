"""Whether masked patch reconstruction, CoVLR's picture term, helps retrieval: a trial outside the package, on emoji.

    python benchmarks/method/patches.py --emoji FOLDER --out DIR [--seeds 0 1 2 3 4] [--write]

Half of the patches are replaced by a learned token, and the tower's tokens, alone or after one layer of attention over
the caption's, have to give the pixels of those patches back (mean squared error on normalised pixels). That is added to
the contrastive loss at a weight; the vision tower is shared, the rest is thrown away. The same data, initial weights
and batches for each variant of a seed. B pairs, P patches, W width. Finished seeds are files in DIR/cells.
"""

import argparse
import json
import math
import sys
from contextlib import closing
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from analyse import write_study  # noqa: E402
from cell import ENDPOINTS, split_emoji  # noqa: E402
from common import commit  # noqa: E402
from kept import Refused, kept_cell, settings, shards_of  # noqa: E402

from vlscale.config import validate  # noqa: E402
from vlscale.distributed import Ranks  # noqa: E402
from vlscale.evaluate.run import EvalRequest, evaluate_model  # noqa: E402
from vlscale.kernels import contrastive_loss  # noqa: E402
from vlscale.models.hf_folder import save_folder  # noqa: E402
from vlscale.sections import Config  # noqa: E402
from vlscale.train.setup import Parts, build_parts, build_stream  # noqa: E402

MASKED = 0.5  # of the patches
VARIANTS = {  # weight, and whether the caption may be looked at
    "contrastive": (0.0, False),
    "patches-0.1": (0.1, False),
    "patches-caption-0.1": (0.1, True),
    "patches-caption-1": (1.0, True),
}


class PatchHead(nn.Module):
    """Tokens of a masked picture (B, P, W), and of its caption, to pixels (B, P, 3 patch^2)."""

    def __init__(self, width: int, text_width: int, pixels: int, sees_caption: bool):
        super().__init__()
        self.attention = (
            nn.MultiheadAttention(width, 4, kdim=text_width, vdim=text_width, batch_first=True)
            if sees_caption
            else None
        )
        self.norm = nn.LayerNorm(width)
        self.out = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, pixels))

    def forward(self, tokens: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        if self.attention is not None:
            tokens = tokens + self.attention(tokens, words, words, key_padding_mask=mask == 0, need_weights=False)[0]
        return self.out(self.norm(tokens))


def train(config: Config, parts: Parts, weight: float, sees_caption: bool) -> None:
    model, ranks = parts.model, Ranks()
    vision, text = model.vision_model.config, model.text_model.config
    torch.manual_seed(config.train.seed)
    model.vision_model.embeddings.mask_token = nn.Parameter(torch.zeros(1, 1, vision.hidden_size))
    head = PatchHead(vision.hidden_size, text.hidden_size, 3 * vision.patch_size**2, sees_caption)
    trained = [*model.parameters(), *(head.parameters() if weight else ())]
    steps, optim = config.train.max_steps, config.optim
    optimizer = torch.optim.AdamW(trained, lr=optim.lr, weight_decay=optim.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / optim.warmup_steps) * 0.5 * (1 + math.cos(math.pi * step / steps)),
    )
    with closing(iter(build_stream(config, parts, ranks, None))) as batches:
        for batch in islice(batches, steps):
            given = parts.inputs.student(batch)
            pixels = model.normalise(given["pixels"])
            image, words = model.encode_image(pixels), (given["input_ids"], given["attention_mask"])
            text_rows, text_tokens = model.text_tokens(*words)
            loss = contrastive_loss(image, text_rows, model.logit_scale.exp().squeeze(), pair_id=batch.pair_id)
            if weight:
                loss = loss + weight * reconstruction(model.vision_model, head, pixels, text_tokens, words[1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    del model.vision_model.embeddings.mask_token
    model.vision_model.embeddings.mask_token = None


def reconstruction(vision: nn.Module, head: PatchHead, pixels: Tensor, words: Tensor, mask: Tensor) -> Tensor:
    side = vision.config.patch_size
    patches = F.unfold(pixels, side, stride=side).transpose(1, 2)  # (B, P, 3 side^2), in the tower's order
    hidden = torch.rand(patches.shape[:2]) < MASKED
    tokens = vision(pixel_values=pixels, bool_masked_pos=hidden).last_hidden_state[:, 1:]
    return F.mse_loss(head(tokens, words, mask)[hidden], patches[hidden])


def run_seed(recipe: dict, shards: dict[str, list[str]], seed: int, folder: Path) -> dict[str, dict[str, float]]:
    measured = {}
    for name, (weight, sees_caption) in VARIANTS.items():
        data = recipe["data"] | {"train": shards["train"], "manifest_dir": str(folder / "manifests")}
        own = recipe | {"data": data, "train": recipe["train"] | {"seed": seed}}
        config = validate({key: value for key, value in own.items() if key != "teachers"}, "patches")
        parts = build_parts(config, folder / "none", Ranks())
        train(config, parts, weight, sees_caption)
        saved = folder / f"{name}-{seed}"
        weights = dict(parts.model.state_dict())
        save_folder(saved, parts.model, weights, parts.tokenizer, parts.image_processor)
        request = EvalRequest(
            str(saved), shards["test"], "labels", config.eval.labels, caption_key=config.data.caption_key
        )
        _, result = evaluate_model(request)
        found = {key: result[f"{config.eval.labels[0]}:{place}"].value for key, place in ENDPOINTS.items()}
        measured[name] = {"rsum": result["rsum"].value, **found, "single": (found["i2i"] + found["t2t"]) / 2}
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emoji", type=Path, required=True, help="folder of emoji shards")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, help="default: those of trained.yaml")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    recipe = yaml.safe_load((HERE / "trained.yaml").read_text())["recipes"]["emoji"]
    recipe["optim"] |= {"lr": 1e-3}
    if given.steps:
        recipe["train"] |= {"max_steps": given.steps}
    settings_of = {name: {"weight": weight, "sees_caption": seen} for name, (weight, seen) in VARIANTS.items()}
    cells = given.out / "cells"
    cells.mkdir(parents=True, exist_ok=True)
    for seed in given.seeds:
        name = f"emoji-seed-{seed}"
        path = cells / f"{name}.json"
        job = {"name": name, "level_name": "emoji", "seed": seed, "split": "test", "recipe": recipe}
        job |= {"shards": shards_of(given.emoji), "runs": settings_of, "result": path, "folder": given.out / "none"}
        try:
            kept = kept_cell(job, {}, "this command")
        except Refused as problem:
            parser.error(str(problem))
        if kept is None:
            trained_at = commit()
            measured = run_seed(recipe, split_emoji(given.emoji, seed), seed, given.out)
            cell = {**settings(job), "commit": trained_at, "measured": measured}
            path.write_text(json.dumps(cell, indent=1) + "\n")
    study = {
        "name": "patches", "levels": {"emoji": {}}, "seeds": given.seeds,
        "methods": {name: {} for name in VARIANTS},
        "comparisons": [(name, "contrastive") for name in list(VARIANTS)[1:]],
        "command": "python benchmarks/method/patches.py --emoji FOLDER --out DIR --write",
    }  # fmt: skip
    write_study(study, cells, {"emoji": settings_of}, given.out, keep=given.write)


if __name__ == "__main__":
    main()
