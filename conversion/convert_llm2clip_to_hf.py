"""Official checkpoints into model folders; `llm2clip convert` by another name.

python conversion/convert_llm2clip_to_hf.py SOURCE OUTPUT --recipe NAME --llm LLM

All of it lies in `modeling_llm2clip/hub/conversion/`, so that the command works where only the
package is installed.
"""

from __future__ import annotations

import sys

from modeling_llm2clip.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
