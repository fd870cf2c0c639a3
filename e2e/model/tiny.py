"""Writes a language model of random numbers for llama.cpp: `tiny.py FILE`. The model is small, so that this takes a moment.

The model writes gibberish. What matters is that a real server samples, streams, constrains and counts its output.
"""

import array
import pathlib
import random
import struct
import sys

WIDTH, LAYERS, HEADS, INNER, CONTEXT = 64, 1, 4, 128, 4096
# Three special tokens, one token for each byte, so that the model can read any text, and the characters that it writes.
LETTERS = [chr(code) for code in range(0x21, 0x7F)] + ["\u2581"]
TOKENS = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + LETTERS
KINDS = [2, 3, 3] + [6] * 256 + [1] * len(LETTERS)
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
ALIGNMENT = 32


def text(value):
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def some(kind, value):
    """Returns the bytes of a value in the file's header, without its type."""
    if kind == STRING:
        return text(value)
    if kind == ARRAY:
        inner, values = value
        return struct.pack("<IQ", inner, len(values)) + b"".join(some(inner, one) for one in values)
    return struct.pack({UINT32: "<I", INT32: "<i", FLOAT32: "<f", BOOL: "<?"}[kind], value)


def header():
    return {
        "general.architecture": (STRING, "llama"),
        "general.name": (STRING, "tiny"),
        "llama.block_count": (UINT32, LAYERS),
        "llama.context_length": (UINT32, CONTEXT),
        "llama.embedding_length": (UINT32, WIDTH),
        "llama.feed_forward_length": (UINT32, INNER),
        "llama.attention.head_count": (UINT32, HEADS),
        "llama.attention.head_count_kv": (UINT32, HEADS),
        "llama.attention.layer_norm_rms_epsilon": (FLOAT32, 1e-5),
        "llama.rope.dimension_count": (UINT32, WIDTH // HEADS),
        "llama.vocab_size": (UINT32, len(TOKENS)),
        "tokenizer.ggml.model": (STRING, "llama"),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, TOKENS)),
        "tokenizer.ggml.scores": (ARRAY, (FLOAT32, [0.0] * len(TOKENS))),
        "tokenizer.ggml.token_type": (ARRAY, (INT32, KINDS)),
        "tokenizer.ggml.bos_token_id": (UINT32, 1),
        "tokenizer.ggml.eos_token_id": (UINT32, 2),
        "tokenizer.ggml.add_bos_token": (BOOL, True),
    }


def tensors():
    """Yields the name and the sizes of each tensor, the innermost size first."""
    yield "token_embd.weight", (WIDTH, len(TOKENS))
    for layer in range(LAYERS):
        yield f"blk.{layer}.attn_norm.weight", (WIDTH,)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            yield f"blk.{layer}.{name}.weight", (WIDTH, WIDTH)
        yield f"blk.{layer}.ffn_norm.weight", (WIDTH,)
        yield f"blk.{layer}.ffn_gate.weight", (WIDTH, INNER)
        yield f"blk.{layer}.ffn_up.weight", (WIDTH, INNER)
        yield f"blk.{layer}.ffn_down.weight", (INNER, WIDTH)
    yield "output_norm.weight", (WIDTH,)
    yield "output.weight", (WIDTH, len(TOKENS))


def model():
    """Returns the file: magic, header, table of tensors, and the numbers of each tensor at a multiple of the alignment."""
    numbers = random.Random(1)
    table, data = b"", b""
    count = 0
    for name, shape in tensors():
        size = 1
        for one in shape:
            size *= one
        values = [1.0] * size if "norm" in name else [numbers.gauss(0, 0.05) for _ in range(size)]
        # The first number of each token is large and reaches the output, where it rules out all tokens that are not characters.
        for token in range(len(TOKENS)) if name in ("token_embd.weight", "output.weight") else ():
            values[token * WIDTH] = 5.0 if name == "token_embd.weight" or KINDS[token] == 1 else -5.0
        table += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, len(data))
        data += array.array("f", values).tobytes()
        data += b"\0" * (-len(data) % ALIGNMENT)
        count += 1
    values = header()
    head = b"GGUF" + struct.pack("<IQQ", 3, count, len(values))
    head += b"".join(text(name) + struct.pack("<I", kind) + some(kind, value) for name, (kind, value) in values.items()) + table
    return head + b"\0" * (-len(head) % ALIGNMENT) + data


if __name__ == "__main__":
    pathlib.Path(sys.argv[1]).write_bytes(model())
