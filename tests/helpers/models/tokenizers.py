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


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_bpe_tokenizer(folder: Path, vocabulary: int) -> None:
    """Save a tokenizer of byte pairs with a chat template, such as many decoders have; token 0 ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["hello world, how are you today? user assistant system"] * 3, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    made.chat_template = CHATML
    made.save_pretrained(str(folder))
