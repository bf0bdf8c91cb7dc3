"""Evaluate a saved model on shards: load, embed, measure."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from vlscale.config import read_tree, validate
from vlscale.data.images import ImageSpec
from vlscale.distributed import Ranks
from vlscale.evaluate.embed import EmbeddedCorpus, Preprocess, embed_corpus
from vlscale.evaluate.protocols import evaluate_corpus
from vlscale.evaluate.rerank import check_fusion, rerank_corpus
from vlscale.evaluate.result import EvalResult
from vlscale.models.hf_folder import load_encoder, quiet
from vlscale.progress import Progress
from vlscale.sections import Config, DataConfig

MOST_TOKENS = 4096  # transformers says 1e30 for tokenizers that know no bound


@dataclass(frozen=True)
class EvalRequest:
    model: str  # a run, its final/, or an exported folder
    data: list[str]  # shard urls
    protocol: str = "auto"
    labels: list[str] | None = None  # None: the run's
    caption_key: str | None = None  # None: the run's, else the default
    batch_size: int = 256
    annotations: Path | None = None  # as eval.annotations
    cache: Path | None = None  # as eval.cache
    rerank: int | None = None  # as eval.rerank
    reading: DataConfig | None = None  # how shards are read; None: as the run does, else by the defaults


def evaluate_model(request: EvalRequest, progress: Progress | None = None) -> tuple[EmbeddedCorpus, EvalResult]:
    """Embed every sample that can be read and measure retrieval on them."""
    run = run_config(request.model)
    config = run or Config()
    data = request.reading or config.data
    if request.caption_key is not None:
        data = DataConfig.model_validate(data.model_dump() | {"caption_key": request.caption_key})
    quiet()
    encoder, tokenizer, processor = load_encoder(request.model)
    max_length = run.model.text.max_length if run else longest_text(tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder, ranks = encoder.to(device), Ranks(device=device)
    if request.rerank is not None:
        check_fusion(encoder, f"--rerank {request.rerank}")
    preprocess = Preprocess(ImageSpec.from_processor(processor), tokenizer, max_length)
    reading = encoder, request.data, data, preprocess
    corpus = embed_corpus(*reading, batch_size=request.batch_size, ranks=ranks, progress=progress)
    if progress is not None:
        progress.stop()
    if request.rerank is not None:
        how = {"k": request.rerank, "batch_size": request.batch_size, "ranks": ranks, "protocol": request.protocol}
        corpus = rerank_corpus(encoder, corpus, *reading[1:], **how)
    result = evaluate_corpus(
        corpus,
        request.protocol,
        config.eval.labels if request.labels is None else request.labels,
        annotations=request.annotations,
        cache=request.cache,
    )
    return corpus, result


def longest_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that an exported folder's tokenizer cuts at; the default where it knows no bound."""
    known = tokenizer.model_max_length
    return known if known <= MOST_TOKENS else Config().model.text.max_length


def run_config(model: str) -> Config | None:
    """The resolved config of a run, given the run's folder or its `final/`; None for other folders."""
    for folder in (Path(model), Path(model).parent):
        path = folder / "config.yaml"
        if path.is_file():
            return validate(read_tree(path), where=str(path))
    return None
