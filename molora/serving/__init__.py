"""An OpenAI-compatible server for one bank."""
