"""vlscale: vision-language retrieval training that keeps the relations inside each modality."""

__version__ = "0.1.0"
