"""What the student and the teachers are given: views stacked, teachers from elsewhere with their own inputs."""

from contextlib import closing
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModel

from vlscale.data.batch import Batch
from vlscale.data.images import ImageSpec, normalise
from vlscale.data.stream import TrainStream
from vlscale.data.tokens import tokenise, train_tokenizer
from vlscale.models.hf_folder import new_image_processor
from vlscale.models.teachers import Teacher, Teachers
from vlscale.sections import DataConfig, ObjectiveConfig
from vlscale.train.inputs import Inputs

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
SPEC = ImageSpec(32, (0.5,) * 3, (0.5,) * 3, 2)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a red disc on black", "two blue stars"], vocab_size=60, max_length=24)


@pytest.fixture(scope="module")
def batch(corpus, tokenizer):
    return first_batch(corpus, tokenizer)


def first_batch(corpus, tokenizer, **options) -> Batch:
    data = DataConfig(train=[f"{corpus}/train-*.tar"], caption_key="json:captions", **options)
    stream = TrainStream(data, SPEC, tokenizer, global_batch_size=8, seed=0, second_view=True, second_caption=True)
    with closing(iter(stream)) as batches:
        return next(batches)


def text_teacher(vocab_size: int, source: str | None) -> Teacher:
    config = AutoConfig.for_model("bert", vocab_size=vocab_size, pad_token_id=0, **SMALL)
    return Teacher(AutoModel.from_config(config), torch.nn.Identity(), source)


def image_teacher(size: int, source: str | None) -> Teacher:
    config = AutoConfig.for_model("vit", image_size=size, patch_size=8, **SMALL)
    return Teacher(AutoModel.from_config(config), torch.nn.Identity(), source)


def inputs_with(tokenizer, teachers: Teachers | None, chunk_size: int | None = None) -> Inputs:
    return Inputs(SPEC, tokenizer, teachers, torch.device("cpu"), max_length=24, chunk_size=chunk_size)


def test_first_views_stand_first_and_shorter_tokens_are_padded(batch, tokenizer):
    given = inputs_with(tokenizer, None).student(batch)
    assert given["pixels"].shape == (16, 3, 32, 32)
    assert torch.equal(given["pixels"][:8], batch.images)
    assert torch.equal(given["pixels"][8:], batch.second_images)
    length = max(batch.input_ids.shape[1], batch.second_input_ids.shape[1])
    assert given["input_ids"].shape == given["attention_mask"].shape == (16, length)
    assert given["attention_mask"][:8].sum() == batch.attention_mask.sum()
    assert given["attention_mask"][8:].sum() == batch.second_attention_mask.sum()


def test_without_teachers_there_are_no_rows(batch, tokenizer):
    assert inputs_with(tokenizer, None).teacher_rows(batch) == (None, None)


def test_a_teacher_from_elsewhere_gets_its_own_size_and_tokens(batch, tokenizer, tmp_path):
    new_image_processor(48, (0.4,) * 3, (0.3,) * 3).save_pretrained(tmp_path)
    other = train_tokenizer(batch.captions, vocab_size=200, max_length=24)
    other.save_pretrained(tmp_path)
    assert other.get_vocab() != tokenizer.get_vocab()
    teachers = Teachers(image_teacher(48, str(tmp_path)), text_teacher(len(other), str(tmp_path)))
    image_rows, text_rows = inputs_with(tokenizer, teachers).teacher_rows(batch)
    assert image_rows.shape == text_rows.shape == (8, 32)
    ids, mask = tokenise(other, batch.captions, 24)
    assert torch.equal(text_rows, teachers.text(input_ids=ids, attention_mask=mask))


def test_a_teacher_of_the_same_inputs_gets_the_students(batch, tokenizer):
    teachers = Teachers(image_teacher(32, None), text_teacher(len(tokenizer), None))
    image_rows, text_rows = inputs_with(tokenizer, teachers).teacher_rows(batch)
    assert torch.equal(image_rows, teachers.image(pixel_values=normalise(batch.images, SPEC)))
    assert torch.equal(text_rows, teachers.text(input_ids=batch.input_ids, attention_mask=batch.attention_mask))


def test_packed_pictures_are_made_on_the_device_for_each_tower(corpus, batch, tokenizer, tmp_path):
    new_image_processor(48, (0.4,) * 3, (0.3,) * 3).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    teachers = Teachers(image_teacher(48, str(tmp_path)), text_teacher(len(tokenizer), None))
    packed, inputs = first_batch(corpus, tokenizer, decode="device"), inputs_with(tokenizer, teachers)
    given = inputs.student(packed)["pixels"]
    assert given.shape == (16, 3, 32, 32) and given.dtype == torch.float32
    pictures = torch.cat([batch.images, batch.second_images])  # scenes have the model's size already
    torch.testing.assert_close(given, normalise(pictures, SPEC))
    seen = []
    teachers.image.tower.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["pixel_values"]), with_kwargs=True
    )
    rows, own = inputs.teacher_rows(packed)[0], inputs.teacher_rows(batch)[0]
    assert seen[0].shape == (8, 3, 48, 48)
    torch.testing.assert_close(seen[0], seen[1], atol=0.5 / (255 * 0.3) + 1e-4, rtol=0)  # this one rounds to uint8
    assert (rows * own).sum(1).min() > 0.999


def test_a_batch_that_comes_again_is_not_shown_to_the_teachers_again(corpus, batch, tokenizer):
    teachers = Teachers(image_teacher(32, None), text_teacher(len(tokenizer), None))
    seen, inputs, other = [], inputs_with(tokenizer, teachers), first_batch(corpus, tokenizer)
    teachers.image.tower.register_forward_hook(lambda *call: seen.append(len(call[2].pooler_output)))
    first = inputs.teacher_rows(batch)
    assert all(again is rows for again, rows in zip(inputs.teacher_rows(batch), first, strict=True)) and seen == [8]
    assert torch.equal(inputs.teacher_rows(other)[0], first[0]) and seen == [8, 8]


@pytest.mark.parametrize("cached", [False, True])
def test_a_teacher_that_no_loss_looks_at_does_not_run(batch, tokenizer, cached):
    teachers = Teachers(image_teacher(32, None), text_teacher(len(tokenizer), None))
    ran = []
    for name, teacher in (("image", teachers.image), ("text", teachers.text)):
        teacher.tower.register_forward_hook(lambda *call, name=name: ran.append(name))
    whole = inputs_with(tokenizer, teachers).teacher_rows(batch)
    ran.clear()
    if cached:
        batch = replace(batch, teacher_image=whole[0], teacher_text=whole[1])
    inputs = inputs_with(tokenizer, None if cached else teachers)
    image, text = inputs.teacher_rows(batch, ObjectiveConfig(name="covlr", relation_weight_image=0).teachers_seen)
    assert image is None and torch.allclose(text, whole[1]) and ran == ([] if cached else ["text"])
    assert inputs.teacher_rows(batch, ObjectiveConfig(name="covlr", relation_weight_text=0).teachers_seen)[1] is None
    image, again = inputs.teacher_rows(batch, ObjectiveConfig(name="rvlr").teachers_seen)
    assert torch.allclose(image, whole[0]) and again is text and ran == ([] if cached else ["text", "image"])


def test_teachers_see_a_chunk_at_a_time(batch, tokenizer):
    teachers = Teachers(image_teacher(32, None), text_teacher(len(tokenizer), None))
    seen = []
    teachers.image.tower.register_forward_hook(lambda *call: seen.append(len(call[2].pooler_output)))
    whole, parts = (inputs_with(tokenizer, teachers, chunk).teacher_rows(batch) for chunk in (None, 4))
    assert seen == [8, 4, 4]
    for of_whole, of_parts in zip(whole, parts, strict=True):
        torch.testing.assert_close(of_whole, of_parts)
        assert not of_parts.requires_grad
