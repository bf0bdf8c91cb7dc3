from vlscale.train.terminal import Note


def test_a_loss_of_one_part_stands_alone():
    assert Note().of({"loss": 1.25, "contrastive": 1.25, "grad_norm": 3.0}) == "loss 1.2500"


def test_parts_and_the_last_validation_are_named():
    note = Note()
    values = {"loss": 2.0, "contrastive": 1.5, "relation_text": 0.01234, "probe_modality_gap": 0.3, "logit_scale": 14.3}
    assert note.of(values) == "loss 2.0000 (contrastive 1.5, relation_text 0.0123)"
    note.validated(50, {"rsum": 160.04, "i2t/r@1": 20.0, "t2i/r@1": 19.0, "i2i/ndcg@10_norm": 3.0})
    assert note.of(values | {"loss": 1.0}).endswith("[rsum 160.0, i2t/r@1 20.0, t2i/r@1 19.0 at 50]")


def test_measures_that_a_protocol_does_not_have_are_left_out():
    note = Note()
    note.validated(5, {"sts/spearman": 0.4})
    assert note.of({"loss": 1.0}) == "loss 1.0000"
