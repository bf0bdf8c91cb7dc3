"""Towers, dual encoder and frozen teachers, from any Hugging Face vision and text model."""
