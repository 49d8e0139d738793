"""Models that use flash_edu's attention. They need torch and nothing else."""
from flash_edu.models.gpt import GPTDecoder, TransformerBlock

__all__ = ["GPTDecoder", "TransformerBlock"]
