"""The model card: what the model is, how it was trained and measured, what it is for, how plain transformers loads it.

It tells only what the run's files say. Addresses of data lose user names, passwords and queries, which may be secrets.
"""

from pathlib import Path
from urllib.parse import urlsplit

import yaml

from vlscale import __version__
from vlscale.evaluate.result import EvalResult
from vlscale.export.loaded import LoadedModel, run_folder
from vlscale.sections import Config

TAGS = ["vision-language", "image-text-retrieval", "cross-modal-retrieval", "feature-extraction", "vlscale"]
SHOWN = ("rsum", "/r@1", "/r@5", "/r@10", "/mean_rank", "/ndcg@10", "/ndcg@10_norm", "/map@r")  # ends of names

USE = """\
```python
import torch
from PIL import Image
from transformers import AutoProcessor, {model_class}

folder = "."  # this folder, or where it was uploaded
model = {model_class}.from_pretrained(folder).eval()
processor = AutoProcessor.from_pretrained(folder)

captions = ["a red disc", "two blue stars"]
pictures = [Image.open("picture.jpg").convert("RGB")]
text = processor.tokenizer(captions, padding={padding}, truncation=True, return_tensors="pt")
pixels = processor.image_processor(pictures, return_tensors="pt").pixel_values
with torch.no_grad():
    out = model(input_ids=text.input_ids, {mask}pixel_values=pixels)
similarity = out.text_embeds @ out.image_embeds.T  # cosine, (captions, pictures)
print(similarity)
```"""

FUSION = """\
`fusion/` holds a fusion encoder, which looks at a picture and a caption together and says how well they match: slower
than comparing vectors, and better at ordering the nearest of them. `transformers` neither needs nor loads it; vlscale
does, in `vlscale eval --rerank K`, `vlscale search --rerank K` and `vlscale.models.fusion_folder.load_fusion`."""

LIMITS = """\
Meant for retrieval: pictures by text, text by picture, and search inside each modality. Scores order a gallery; they
are no probabilities, and no threshold on them was calibrated. The model knows what its training pairs showed: it
carries their gaps and biases. It was not evaluated for decisions about people, for safety-critical use, or for
languages and kinds of pictures that the data above do not hold. Measure it on your own data before you rely on it."""


def write_card(model: LoadedModel, folder: Path, model_class: str) -> None:
    run = run_folder(model.path)
    result = _last_evaluation(run)
    name = (run or Path(model.path)).resolve().name
    sections = [
        _front_matter(),
        f"# {name}",
        _what(model, model_class),
        "## Use\nOnly `transformers`, `torch` and `pillow` are needed:\n\n" + _use(model_class),
        *(["## Re-ranking\n" + FUSION] if model.encoder.fusion is not None else []),
        "## Training\n" + (_training(model.config) if model.config else "This folder came without a training config."),
        "## Data\n" + (_data(model.config) if model.config else "Not recorded."),
        "## Evaluation\n" + (_evaluation(result) if result else "No evaluation was recorded (`vlscale eval`)."),
        "## Intended use and limits\n" + LIMITS,
    ]
    (folder / "README.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _use(model_class: str) -> str:
    """SiglipModel takes captions padded to its full length and unmasked."""
    siglip = model_class == "SiglipModel"
    mask = "" if siglip else "attention_mask=text.attention_mask, "
    return USE.format(model_class=model_class, padding='"max_length"' if siglip else "True", mask=mask)


def _front_matter() -> str:
    known = yaml.safe_dump({"library_name": "transformers", "tags": TAGS}, sort_keys=False)
    return f"---\nlicense:  # yours to choose before you share this model\n{known}---"


def _what(model: LoadedModel, model_class: str) -> str:
    encoder, spec = model.encoder, model.preprocess.spec
    towers = [
        f"| {what} tower | {tower.config.model_type}, {sum(p.numel() for p in tower.parameters()):,} parameters |"
        for what, tower in (("vision", encoder.vision_model), ("text", encoder.text_model))
    ]
    fusion = []
    if encoder.fusion is not None:
        count, size = len(encoder.fusion.layers), sum(p.numel() for p in encoder.fusion.parameters())
        fusion = [f"| fusion encoder | {count} layers, {size:,} parameters |"]
    rows = [
        "| | |",
        "|---|---|",
        f"| class | `{model_class}` |",
        *towers,
        f"| embeddings | {model.embed_dim} numbers, length one |",
        f"| pictures | {spec.size} x {spec.size} pixels |",
        *fusion,
        f"| text | at most {model.preprocess.max_length} tokens |",
        f"| hash | `{model.hash}` |",
    ]
    intro = "A dual encoder: pictures and text become vectors in one space, and near vectors mean much the same."
    return f"{intro} Exported by vlscale {__version__}.\n\n" + "\n".join(rows)


def _training(config: Config) -> str:
    objective, optim, train, engine = config.objective, config.optim, config.train, config.engine
    said = {
        "objective": f"{objective.name}, {objective.loss} loss",
        "teacher": config.teacher.source,
        "relation weights (image, text)": f"{objective.image_relation_weight}, {objective.text_relation_weight}",
        **({"steps": f"{train.max_steps:,}"} if train.epochs is None else {"epochs": f"{train.epochs:g}"}),
        "global batch": f"{train.global_batch_size:,} pairs",
        "optimizer": f"{optim.name}, lr {optim.lr:g} ({optim.schedule}), weight decay {optim.weight_decay:g}",
        "precision": engine.dtype,
        "seed": str(train.seed),
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in said.items())])


def _data(config: Config) -> str:
    lines = [f"- training: `{_public(url)}`" for url in config.data.train or []]
    lines += [f"- validation: `{_public(url)}`" for url in config.data.val or []]
    return "\n".join([*lines, f"- captions from `{config.data.caption_key}`"])


def _public(url: str) -> str:
    """Without user name, password, query and fragment; of a local path, the name alone; of a command, its name."""
    if url.startswith("pipe:"):
        return " ".join(url.split()[:1])
    parts = urlsplit(url)
    if parts.scheme in ("", "file"):
        return Path(parts.path).name
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _last_evaluation(run: Path | None) -> EvalResult | None:
    path = run and run / "eval.json"
    if path is None or not path.is_file():
        return None
    try:
        return EvalResult.from_json(path.read_text())
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no evaluation that can be read ({error!r}); delete it or evaluate again") from None


def _evaluation(result: EvalResult) -> str:
    head = f"Protocol `{result.protocol}`: {result.images:,} pictures, {result.captions:,} captions."
    rows = ["| measure | value | 95 % interval | chance |", "|---|---|---|---|"]
    for name, measure in result.metrics.items():
        if name.endswith(SHOWN):
            bounds = "" if measure.low is None else f"{measure.low:.1f} to {measure.high:.1f}"
            chance = "" if measure.chance is None else f"{measure.chance:.1f}"
            rows.append(f"| {name} | {measure.value:.1f} | {bounds} | {chance} |")
    return "\n".join([head, "", *rows, *(f"\n{note}" for note in result.notes)])
