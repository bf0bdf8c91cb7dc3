"""What the terminal says of a run beside its bar: the loss, its parts, and how well the model retrieved at last."""

PARTS = (
    "contrastive", "view", "caption", "iic", "ttc", "itm", "mlm", "relation_image", "relation_text", "kd", "kd_image",
    "kd_text",
)  # fmt: skip
RECALL = ("rsum", "i2t/r@1", "t2i/r@1")


class Note:
    """One short line, of the newest numbers."""

    def __init__(self) -> None:
        self._validated = ""

    def validated(self, step: int, measured: dict[str, float]) -> None:
        """The retrieval measures of a validation after `step`."""
        known = [f"{name} {measured[name]:.1f}" for name in RECALL if name in measured]
        self._validated = f"  [{', '.join(known)} at {step}]" if known else ""

    def of(self, values: dict[str, float]) -> str:
        """`values`: a step's numbers, the loss among them. Its parts are named where there are several."""
        parts = [f"{name} {values[name]:.3g}" for name in PARTS if name in values]
        named = f" ({', '.join(parts)})" if len(parts) > 1 else ""
        return f"loss {values['loss']:.4f}{named}{self._validated}"
