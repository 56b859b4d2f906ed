"""llama.cpp's own library, by its C interface: logits of every token of a text.

The wheel xllamacpp carries the library, and its functions are visible in it. Structures that are
passed by value are made larger than they are: both sides leave the rest alone.
"""

import ctypes
from ctypes import POINTER, c_char_p, c_float, c_int8, c_int32, c_uint32, c_void_p
from importlib import util
from pathlib import Path

import numpy as np


class _Settings(ctypes.Structure):
    _fields_ = [("words", c_uint32 * 256)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


def library():
    """Return the library, or None where it is not installed."""
    spec = util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        return None
    [file] = Path(spec.origin).parent.glob("xllamacpp*.so")
    found = ctypes.CDLL(str(file))
    returned = {
        "llama_model_default_params": _Settings,
        "llama_context_default_params": _Settings,
        "llama_model_load_from_file": c_void_p,
        "llama_init_from_model": c_void_p,
        "llama_model_get_vocab": c_void_p,
        "llama_vocab_n_tokens": c_int32,
        "llama_batch_init": _Batch,
        "llama_decode": c_int32,
        "llama_get_logits": POINTER(c_float),
        "llama_tokenize": c_int32,
    }
    for name, kind in returned.items():
        getattr(found, name).restype = kind
    found.said = []  # the latest lines of its log
    found.keep = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)(
        lambda level, text, _: found.said.append(text.decode(errors="replace"))
    )
    found.llama_log_set(found.keep, None)
    found.llama_backend_init()
    return found


class Model:
    """A GGUF file under llama.cpp."""

    def __init__(self, found, file, *, tokens=512):
        self._lib = found
        settings = found.llama_model_default_params()
        self._model = found.llama_model_load_from_file(str(file).encode(), settings)
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {file}: {''.join(found.said[-5:])}")
        context = found.llama_context_default_params()
        context.words[0] = context.words[1] = context.words[2] = tokens  # n_ctx, n_batch, n_ubatch
        self._context = found.llama_init_from_model(c_void_p(self._model), context)
        self._vocab = c_void_p(found.llama_model_get_vocab(c_void_p(self._model)))
        self.size = found.llama_vocab_n_tokens(self._vocab)
        self._batch = found.llama_batch_init(c_int32(tokens), 0, 1)

    def logits(self, tokens):
        """Return the logits after each token, [tokens, vocabulary], of a text that begins here."""
        memory = self._lib.llama_get_memory
        memory.restype = c_void_p
        self._lib.llama_memory_clear(c_void_p(memory(c_void_p(self._context))), True)
        self._batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            self._batch.token[place], self._batch.pos[place] = int(token), place
            self._batch.n_seq_id[place], self._batch.seq_id[place][0] = 1, 0
            self._batch.logits[place] = 1
        if self._lib.llama_decode(c_void_p(self._context), self._batch):
            raise ValueError("llama_decode failed")
        found = self._lib.llama_get_logits(c_void_p(self._context))
        return np.ctypeslib.as_array(found, (len(tokens), self.size)).copy()

    def tokenize(self, text):
        """Return the tokens of a text, without special ones."""
        raw = text.encode()
        room = (c_int32 * (len(raw) + 8))()
        count = self._lib.llama_tokenize(self._vocab, raw, len(raw), room, len(room), False, False)
        return list(room[:count])

    def close(self):
        """Free it."""
        self._lib.llama_free(c_void_p(self._context))
        self._lib.llama_model_free(c_void_p(self._model))
