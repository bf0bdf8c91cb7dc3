"""`objective` and `meta`: the terms of the loss, and at which parameters they are looked at."""

from typing import Literal

from pydantic import Field, model_validator

from vlscale.sections.base import Section


class ObjectiveConfig(Section):
    name: Literal["contrastive", "covlr", "rvlr"] = "contrastive"
    loss: Literal["softmax", "sigmoid"] = "softmax"
    contrastive_weight: float = Field(1.0, ge=0)  # rvlr's itc
    relation_weight: float = Field(0.1, ge=0)  # covlr only
    relation_weight_image: float | None = Field(None, ge=0)  # null: relation_weight
    relation_weight_text: float | None = Field(None, ge=0)
    relation_reliability: bool = False  # covlr: each of these weights times what was measured of its teacher, at most 1
    conflict: Literal["keep", "scale", "project"] = "keep"  # what becomes of relations where their gradient to a
    # modality's embeddings opposes consistency's: nothing; scaled by 1 + cosine; without the part that opposes
    student_temperature: float = Field(0.1, gt=0)
    teacher_temperature: float = Field(0.1, gt=0)  # of KL; mae, mse and wasserstein take student_temperature for both
    relation_scope: Literal["row", "matrix"] = "row"
    relation: Literal["cosine", "euclidean"] = "cosine"
    # The next ones are rvlr's, by the paper's names. The defaults are a tenth of the official weights, which are in
    # configs/rvlr-official.yaml: docs/method.md tells what was measured.
    iic_weight: float = Field(0.1, ge=0)  # contrast of image embeddings with the image teacher's, projected
    ttc_weight: float = Field(0.2, ge=0)
    kd_weight: float = Field(0.2, ge=0)  # student relations against the mixture w T_text + (1 - w) T_image
    kd_image_weight: float = Field(0.1, ge=0)  # the image teacher's relations against the mixture: what w learns from
    kd_text_weight: float = Field(0.1, ge=0)
    relation_distance: Literal["mae", "mse", "kl", "wasserstein"] = "mae"
    cross_modal_relation: bool = False  # kd also of the symmetrised image-text matrix (mae and mse)
    view_weight: float = Field(0.0, ge=0)  # contrast of two augmented views of a picture
    caption_weight: float = Field(0.0, ge=0)  # contrast of two captions of a sample
    # The next ones are a fusion encoder's, under any name.
    itm_weight: float | None = Field(None, ge=0)  # matching; null: 1, or 0 where the model has no fusion encoder
    mlm_weight: float = Field(0.0, ge=0)  # masked words of a caption, with its picture to look at
    mlm_probability: float = Field(0.15, gt=0, lt=1)  # share of the words that are asked for
    impl: Literal["auto", "triton", "chunked", "reference"] = "auto"

    @property
    def image_relation_weight(self) -> float:
        return self._relation_weight(self.relation_weight_image)

    @property
    def text_relation_weight(self) -> float:
        return self._relation_weight(self.relation_weight_text)

    def _relation_weight(self, own: float | None) -> float:
        if self.name != "covlr":
            return 0.0
        return self.relation_weight if own is None else own

    @property
    def teachers_seen(self) -> tuple[bool, bool]:
        """Whether a step looks at the image teacher's embeddings, and at the text teacher's, where there are any."""
        if self.name != "covlr":
            return True, True
        return self.image_relation_weight > 0, self.text_relation_weight > 0

    @property
    def temperature_of_teachers(self) -> float:
        """At which the teachers' relations are looked at."""
        return self.teacher_temperature if self._softmax else self.student_temperature

    @property
    def euclidean(self) -> bool:
        """Whether relations are negative distances, and not cosines."""
        return self._softmax and self.relation == "euclidean"

    @property
    def _softmax(self) -> bool:
        return self.name != "rvlr" or self.relation_distance == "kl"

    @property
    def matching_weight(self) -> float:
        """Where there is a fusion encoder."""
        return 1.0 if self.itm_weight is None else self.itm_weight

    @property
    def fuses(self) -> bool:
        """Whether a fusion encoder, where there is one, has anything to do."""
        return self.matching_weight > 0 or self.mlm_weight > 0 or (self.name == "rvlr" and self.kd_weight > 0)

    @property
    def distils(self) -> bool:
        """Whether a relation of a student is held to one of a teacher."""
        of_rvlr = (self.kd_weight, self.kd_image_weight, self.kd_text_weight)
        return any(of_rvlr if self.name == "rvlr" else (self.image_relation_weight, self.text_relation_weight))

    @property
    def contrasts(self) -> bool:
        """Whether consistency has a weight: what a meta step moves the parameters by."""
        return any((self.contrastive_weight, self.view_weight, self.caption_weight)) or self._contrasts_with_teachers

    def too_few_pairs(self, pairs: int, fusion: bool) -> str | None:
        """Of a global batch of so many pairs: which term says nothing there, how many it takes, and what to set
        instead; None where all say something. `fusion`: whether there is a fusion encoder."""
        contrasts = ["contrastive_weight", "view_weight", "caption_weight"]
        contrasts += ["iic_weight", "ttc_weight"] if self.name == "rvlr" else []
        asked = next((name for name in contrasts if getattr(self, name) > 0), None)
        if pairs < 2 and asked:
            return (
                f"objective.{asked} tells a pair from the others of its batch, and there are none; expected at least 2"
            )
        if pairs < 2 and fusion and self.matching_weight > 0:
            return (
                "objective.itm_weight takes other pairs of the batch as negatives, and there are none; expected at "
                "least 2, or objective.itm_weight=0"
            )
        least = 3 if self._softmax else 2
        if pairs >= least or not self.distils:
            return None
        why = "one has one, whose share is 1 whatever the model says" if pairs == 2 else "there are no others"
        weights = "objective.relation_weight=0"
        if self.name == "rvlr":
            weights = "0 for objective.kd_weight, kd_image_weight and kd_text_weight"
            weights = f"objective.relation_distance=mae with 2, or {weights}" if self._softmax else weights
        return (
            f"relations are a sample's to the others of its batch, and {why}; expected at least {least}, or {weights}"
        )

    @property
    def needs_teachers(self) -> bool:
        return self.distils or self._contrasts_with_teachers

    @property
    def _contrasts_with_teachers(self) -> bool:
        return self.name == "rvlr" and (self.iic_weight > 0 or self.ttc_weight > 0)

    @model_validator(mode="after")
    def _possible(self) -> "ObjectiveConfig":
        if self.name == "rvlr" and self.cross_modal_relation and self.relation_distance not in ("mae", "mse"):
            raise ValueError(
                f"objective.cross_modal_relation needs objective.relation_distance mae or mse, got "
                f"{self.relation_distance}; choose one of them or set objective.cross_modal_relation=false"
            )
        return self


class MetaConfig(Section):
    """CoVLR's meta step: consistency at theta, relations at theta' = theta - a grad(consistency)."""

    mode: Literal["joint", "heads", "first_order", "finite_difference"] = "joint"  # joint: theta' = theta
    inner_lr: float | None = Field(None, ge=0)  # null: 0.02 for heads, 0.001 where everything is shifted
    inner_lr_unit: Literal["absolute", "gradient", "parameter"] = "parameter"
    # absolute: a = inner_lr; gradient: the shift is inner_lr long; parameter: inner_lr times as long as what it shifts
    test_batch: Literal["same", "next"] = "same"  # the batch whose relations are looked at at theta'
    epsilon: float | None = Field(None, gt=0)  # finite_difference: length of its two shifts over that of the
    # parameters; null: 2e-5 in fp32, 5e-4 in bf16

    @model_validator(mode="after")
    def _next_needs_a_shift(self) -> "MetaConfig":
        if self.mode == "joint" and self.test_batch == "next":
            raise ValueError("meta.test_batch=next needs a meta step, got meta.mode=joint; set meta.mode=heads")
        return self

    @model_validator(mode="after")
    def _unit_has_a_default(self) -> "MetaConfig":
        if self.inner_lr is None and self.inner_lr_unit != "parameter":
            raise ValueError(
                f"meta.inner_lr_unit={self.inner_lr_unit} needs meta.inner_lr, which has a default only in "
                "meta.inner_lr_unit=parameter; give a number, or leave the unit out"
            )
        return self

    @property
    def rate(self) -> float:
        """`inner_lr`, or what the study of modes found right for this one."""
        if self.inner_lr is not None:
            return self.inner_lr
        return 0.02 if self.mode == "heads" else 0.001
