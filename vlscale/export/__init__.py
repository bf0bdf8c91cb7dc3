"""Out of vlscale: Hugging Face folders with a model card, embeddings on disk, and search over them."""
