"""Evaluation while training: the retrieval measures of `data.val`, into eval.jsonl (all) and eval.json (the last)."""

import json
import os
from pathlib import Path

from torch import nn

from vlscale.distributed import Ranks
from vlscale.evaluate.embed import Preprocess, embed_corpus
from vlscale.evaluate.protocols import evaluate_corpus
from vlscale.evaluate.rerank import check_fusion, rerank_corpus
from vlscale.logging import get_logger
from vlscale.sections import Config
from vlscale.train.disk_faults import optional
from vlscale.train.metrics_file import MetricsFile
from vlscale.train.setup import Parts

SHOWN = ("rsum", "reranked:rsum", "i2t/r@1", "t2i/r@1", "i2i/ndcg@10_norm", "t2t/ndcg@10_norm")


class Validation:
    """Runs every `eval.every` steps and after the last one, where `data.val` is given."""

    def __init__(self, config: Config, folder: Path, parts: Parts, ranks: Ranks, keep_until: int):
        self.config, self.folder, self.ranks = config, folder, ranks
        self.preprocess = Preprocess(parts.spec, parts.tokenizer, config.model.text.max_length)
        wanted = config.data.val is not None
        if wanted and config.eval.rerank is not None:
            check_fusion(parts.model, f"eval.rerank={config.eval.rerank}")
        self._log = MetricsFile(folder / "eval.jsonl", keep_until) if wanted and ranks.first else None

    def due(self, step: int) -> bool:
        if self.config.data.val is None:
            return False
        every = self.config.eval.every
        return step == self.config.train.max_steps or (every is not None and step % every == 0)

    def run(self, step: int, module: nn.Module) -> dict[str, float] | None:
        """The measures, on rank 0. On all ranks together; `module` is left in training mode."""
        config = self.config
        module.eval()
        wanted, reading = config.eval, (config.data.val, config.data, self.preprocess)
        how = {"batch_size": wanted.batch_size, "ranks": self.ranks}
        corpus = embed_corpus(module, *reading, **how)
        if wanted.rerank is not None:
            shown = self.ranks.first and config.log.progress
            how |= {"k": wanted.rerank, "protocol": wanted.protocol, "progress": shown}
            corpus = rerank_corpus(module, corpus, *reading, **how)
        module.train()
        if self._log is None:
            return None
        annotations, cache = (path and Path(path) for path in (wanted.annotations, wanted.cache))
        result = evaluate_corpus(corpus, wanted.protocol, wanted.labels, annotations=annotations, cache=cache)
        values = {name: measure.value for name, measure in result.metrics.items()}
        self._log.write({"step": step, "protocol": result.protocol} | values)
        partial, last = self.folder / ".eval.json.partial", self.folder / "eval.json"
        with optional(str(last)):
            partial.write_text(json.dumps({"step": step} | result.to_dict(), indent=1))
            os.replace(partial, last)
        shown = "  ".join(f"{name} {values[name]:.1f}" for name in values if name in SHOWN)
        get_logger().info("validation after step %d: %s", step, shown)
        return values
