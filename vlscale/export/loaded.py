"""A saved model made ready to embed, and the hash that says which embeddings are comparable."""

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from vlscale.data.images import ImageSpec, decode_eval, normalise
from vlscale.data.tokens import tokenise
from vlscale.evaluate.embed import Preprocess
from vlscale.evaluate.run import longest_text, run_config
from vlscale.models.dual_encoder import SCALARS, DualEncoder
from vlscale.models.hf_folder import dual_weights, load_encoder, quiet
from vlscale.sections import Config


@dataclass(frozen=True)
class LoadedModel:
    """`config` is the run's where the model is a run's, else None."""

    path: str
    encoder: DualEncoder
    tokenizer: PreTrainedTokenizerBase
    image_processor: BaseImageProcessor
    preprocess: Preprocess
    config: Config | None

    @property
    def embed_dim(self) -> int:
        return self.encoder.visual_projection.out_features

    @property
    def device(self) -> torch.device:
        return self.encoder.logit_scale.device

    @cached_property
    def hash(self) -> str:
        """Equal for models that embed alike: of the weights (but the scale and bias of the loss, and a fusion encoder)
        and the preprocessing.

        A run, its `final/` and every export of it share one.
        """
        digest = blake2b(digest_size=16)
        for name, value in sorted(dual_weights(self.encoder.state_dict()).items()):
            if name not in SCALARS:
                digest.update(f"{name} {tuple(value.shape)}".encode())
                digest.update(value.detach().float().cpu().contiguous().numpy())
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        rest = [asdict(self.preprocess.spec), self.preprocess.max_length, vocabulary]
        digest.update(json.dumps(rest, sort_keys=True).encode())
        return digest.hexdigest()

    def embed_text(self, text: str) -> Tensor:
        """(1, D) float32 on the host."""
        return self.embed_texts([text])

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        """(B, D) float32 on the host."""
        preprocess = self.preprocess
        ids, mask = tokenise(preprocess.tokenizer, texts, preprocess.max_length)
        return self.encoder.encode_text(ids.to(self.device), mask.to(self.device)).float().cpu()

    @torch.no_grad()
    def embed_picture(self, encoded: bytes) -> Tensor:
        """(1, D) float32 on the host. Raises BadSample."""
        spec = self.preprocess.spec
        pixels = torch.from_numpy(decode_eval(encoded, spec)).permute(2, 0, 1)[None]
        return self.encoder.encode_image(normalise(pixels.to(self.device), spec)).float().cpu()


def load_model(path: str, device: torch.device | None = None) -> LoadedModel:
    """A run, its `final/` or an exported folder, on `device` (the accelerator where there is one)."""
    quiet()
    encoder, tokenizer, processor = load_encoder(path)
    config = run_config(path)
    max_length = config.model.text.max_length if config else longest_text(tokenizer)
    preprocess = Preprocess(ImageSpec.from_processor(processor), tokenizer, max_length)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return LoadedModel(path, encoder.to(device), tokenizer, processor, preprocess, config)


def run_folder(path: str) -> Path | None:
    """The folder of the run that `path` names or is the `final/` of; None for other folders."""
    return next((folder for folder in (Path(path), Path(path).parent) if (folder / "config.yaml").is_file()), None)
