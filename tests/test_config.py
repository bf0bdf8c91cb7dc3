"""Configs: defaults, bases, overrides, stages, and one clear line for every mistake."""

from pathlib import Path
from typing import get_args

import pytest
import yaml

from vlscale.config import dump, known_keys, load_plan, merge, parse_overrides, validate
from vlscale.sections import Config, Protocol

ROOT = Path(__file__).resolve().parents[1]


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_overrides_are_yaml_and_reach_nested_keys():
    tree = parse_overrides(["train.seed=3", "model.locked=[vision]", "data.train=a::b", "optim.lr=1e-3"])
    config = validate(tree, "test")
    assert config.train.seed == 3 and config.model.locked == ["vision"]
    assert config.data.train == ["a", "b"] and config.optim.lr == 1e-3


def test_base_files_lie_below_and_huggingface_configs_are_replaced_whole(tmp_path):
    write(tmp_path, "base.yaml", "train: {seed: 1, max_steps: 50}\nmodel: {vision: {config: {model_type: vit, a: 1}}}")
    top = write(
        tmp_path, "top.yaml", "base: base.yaml\ntrain: {seed: 2}\nmodel: {vision: {config: {model_type: beit}}}"
    )
    (run,) = load_plan(top, [])
    assert (run.config.train.seed, run.config.train.max_steps) == (2, 50)
    assert run.config.model.vision.config == {"model_type": "beit"}


def test_circular_bases_are_refused(tmp_path):
    write(tmp_path, "a.yaml", "base: b.yaml")
    path = write(tmp_path, "b.yaml", "base: a.yaml")
    with pytest.raises(ValueError, match="circle"):
        load_plan(path, [])


def test_stages_start_from_the_body_with_overrides_and_their_own_values_win(tmp_path):
    text = (
        "train: {max_steps: 9}\nstages: {warm: {train: {max_steps: 5}}}\nvariants: {one: {}, two: {optim: {lr: 0.5}}}"
    )
    plan = load_plan(write(tmp_path, "c.yaml", text), ["train.seed=4", "train.max_steps=7"])
    assert [run.name for run in plan] == ["warm", "one", "two"]
    assert [run.config.train.max_steps for run in plan] == [5, 7, 7]
    assert {run.config.train.seed for run in plan} == {4}
    assert plan[2].config.optim.lr == 0.5


def test_without_variants_the_body_runs_last_in_the_folder_itself(tmp_path):
    plan = load_plan(write(tmp_path, "c.yaml", "stages: {warm: {}}"), [])
    assert [run.name for run in plan] == ["warm", ""]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.max_step=3", "unknown key 'train.max_step'; did you mean 'train.max_steps'"),
        ("lr=3", "did you mean 'optim.lr'"),
        ("trian.seed=3", "did you mean 'train"),
        ("optim.lr=-1", "optim.lr.*greater than 0, got -1"),
        ("engine.zero_stage=5", "engine.zero_stage.*got 5"),
        ("engine.dtype=fp8", "engine.dtype.*'fp32' or 'bf16'.*got 'fp8'"),
        ("objective.name=covlr", "needs a teacher.*teacher.source=none"),
        ("objective.contrastive_weight=0", "every objective weight is 0"),
        ("optim.warmup_steps=5000", "warmup_steps=5000 must be below train.max_steps=1000"),
        ("train.epochs=3", "max_steps=1000 and train.epochs=3 both say how long the run is.*set the other to null"),
        ("train={epochs: 0, max_steps: null}", "train.epochs.*greater than 0, got 0"),
        ("teacher.source=hf", "needs teacher.image and teacher.text"),
        ("model.locked=[vison]", "'vision' or 'text', got 'vison'"),
        ("model.locked=vision", r"valid list, model\.locked=\[vision\], got 'vision'"),
        ("train.seed", "expected key=value"),
    ],
)
def test_every_mistake_is_one_line_that_names_it(tmp_path, override, said):
    with pytest.raises(ValueError, match=said) as error:
        load_plan(write(tmp_path, "c.yaml", "train: {max_steps: 1000}"), [override])
    assert "\n" not in str(error.value)


def test_a_missing_file_names_its_neighbour(tmp_path):
    write(tmp_path, "emoji.yaml", "")
    with pytest.raises(ValueError, match=r"emojis.yaml does not exist; did you mean 'emoji.yaml'"):
        load_plan(tmp_path / "emojis.yaml", [])


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2", "stages: 3", "stages: {'../out': {}}"])
def test_files_that_are_no_config_are_refused(tmp_path, text):
    with pytest.raises(ValueError) as error:
        load_plan(write(tmp_path, "c.yaml", text), [])
    assert "\n" not in str(error.value)


def test_a_dumped_config_is_read_back_equal():
    config = validate(parse_overrides(["train.seed=7", "data.val=[x.tar]"]), "test")
    assert validate(yaml.safe_load(dump(config)), "dump") == config


def test_merge_leaves_its_arguments_alone():
    below, above = {"a": {"b": 1}}, {"a": {"c": 2}}
    assert merge(below, above) == {"a": {"b": 1, "c": 2}}
    assert below == {"a": {"b": 1}} and above == {"a": {"c": 2}}


STABLE = """data.train data.val train.global_batch_size train.max_steps train.epochs train.seed train.checkpoint_every
engine.zero_stage engine.dtype engine.comm objective.loss objective.relation_weight objective.relation_weight_image
objective.relation_weight_text objective.name meta.mode model.dropout model.init_from model.locked"""


def test_the_stable_keys_exist():
    assert set(STABLE.split()) <= set(known_keys(Config))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_loads_and_takes_any_objective(path):
    for name in ("contrastive", "covlr"):
        assert load_plan(path, ["data.train=x.tar", f"objective.name={name}"])


def test_the_protocols_of_the_config_are_those_of_evaluation():
    from vlscale.evaluate.protocols import PROTOCOLS

    assert set(get_args(Protocol)) == set(PROTOCOLS)
