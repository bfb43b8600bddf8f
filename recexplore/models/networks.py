"""Which language model a configuration is of: a Transformer, or an EncoderDecoder.

What inference and training ask of either, and of a RewardModel around it:

    read_prefix    what all prompts begin with → as `read_prompts` takes it
    read_prompts   the prefix, B prompts → Context: what continuations look at
    extend         tokens, and segments read before → hidden states, the tokens' own segment
    logits, token_logits, paired_logits    of hidden states; a RewardModel has `score` instead

and for training, of rows of prompt and answer, a Transformer's `prefill` and `extend`, or an
EncoderDecoder's `answer_states`. Their configurations say by `has_encoder` which of the two.
"""

from recexplore.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from recexplore.models.transformer import Transformer, TransformerConfig

LANGUAGE_MODELS = (Transformer, EncoderDecoder)
CONFIGS = (TransformerConfig, EncoderDecoderConfig)
LanguageModel = Transformer | EncoderDecoder
Config = TransformerConfig | EncoderDecoderConfig


def language_model(config: Config) -> LanguageModel:
    """The language model of a configuration."""
    return (EncoderDecoder if config.has_encoder else Transformer)(config)
