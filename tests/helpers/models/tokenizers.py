"""A small tokenizer with a chat template, one token for each character (`save_tokenizer`)."""

from __future__ import annotations

from pathlib import Path

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ('user', 'assistant', 'system') %}{{ raise_exception('no such role') }}{% endif %}"
    "{{ message.role[0] }}:{{ message.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def save_tokenizer(folder: Path, vocabulary: int) -> None:
    """Save a tokenizer whose token n is a printable character, in a folder."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = ["\n", *map(chr, range(32, 127)), *map(chr, range(0x3B1, 0x3B1 + vocabulary))]
    tokenizer = Tokenizer(models.WordLevel({text: n for n, text in enumerate(characters[:vocabulary])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")
    made.chat_template = CHAT_TEMPLATE
    made.save_pretrained(str(folder))
