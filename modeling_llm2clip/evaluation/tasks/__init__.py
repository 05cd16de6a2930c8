"""Evaluation tasks, which compute scores from embeddings and record their protocol."""
