"""Converts official checkpoints into model folders; the same as `llm2clip convert`.

python conversion/convert_llm2clip_to_hf.py SOURCE OUTPUT --source-format NAME --text-model LLM

The code is in `modeling_llm2clip/conversion/`, so the command works if only the package is
installed.
"""

from __future__ import annotations

import sys

from modeling_llm2clip.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
