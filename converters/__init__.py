"""Makes GGUF files with codebooks: out of HF checkpoints (``hf``) and out of GGUF files (``gguf``)."""
