"""Architectures that ``model.factory`` can name (gpt, moe, kan, mamba, vit), and the parts that they share."""
