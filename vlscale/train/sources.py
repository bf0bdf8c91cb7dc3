"""The models that a config names, and whether they are there."""

from pathlib import Path

from vlscale.config import STAGE_PREFIX
from vlscale.models.dual_encoder import final_folder
from vlscale.models.hub_names import check_source
from vlscale.sections import Config


def named_models(config: Config) -> dict[str, str]:
    """By key, those that a run loads, but for those that a stage makes."""
    model, teacher = config.model, config.teacher
    named = {
        "model.vision.source": model.vision.source,
        "model.text.source": model.text.source,
        "model.text.tokenizer": model.text.tokenizer,
        "model.fusion.source": model.fusion and model.fusion.source != "text" and model.fusion.source,
        "model.init_from": model.init_from,
    }
    if teacher.source in ("hf", "cache"):
        named |= {"teacher.image": teacher.image, "teacher.text": teacher.text}
    return {key: source for key, source in named.items() if source and not source.startswith(STAGE_PREFIX)}


def check_models(config: Config, made_under: Path | None = None) -> None:
    """Raises ValueError for the first that is not there. `made_under`: a folder in which a run before may yet make
    some."""
    for key, source in named_models(config).items():
        if made_under is None or not Path(source).absolute().is_relative_to(made_under.absolute()):
            check_source(key, final_folder(source))
