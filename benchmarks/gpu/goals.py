"""What one H100 should reach: goals of `gpu.py`, rates of `scale_plan.py`. Nothing was measured.

Derived from 989 TFLOP/s in bfloat16 and 3.35 TB/s of its data sheet, of which
products reach 650 TFLOP/s, the operations of a model, and the bytes of its other kernels.

| goal | arithmetic |
| --- | --- |
| tokens of a 1B | 2 GFLOP in 3.0 µs, and 1.3 µs for 4 MB of elementwise kernels |
| tokens of an 8B | 14 GFLOP in 20.5 µs, and 5 µs |
| images of L/14-336 | 382 GFLOP in 0.63 ms, and 0.45 ms |
| steps of `align`, 4,096 pairs | 10.4 ms of products of an 8B's head, 12 ms of all else |
| tokens of `finetune-llm` | 4 operations per weight, and the launches of LoRAs |
| the same, recomputed | 6 operations per weight |
| images of a trained tower | 3 times an image of L/14-336, recomputed 4 times |
"""

TOKENS = {"1B": (225_000, 280_000), "8B": (39_000, 44_000)}  # a second: eager, compiled
IMAGES = 900  # a second
ALIGN_STEPS = {("1B", 4096): 100, ("8B", 4096): 45, ("8B", 512): 100}  # a second
# Real tokens per second: activations kept, recomputed.
FINETUNE_TOKENS = {"1B": (75_000, 50_000), "8B": (13_000, 8_700)}
TOWER_IMAGES = (300, 230)  # images per second: kept, recomputed
TRAINING_GB = 70  # of the 80 of the card
RANKS_SECONDS = {False: 0.4, True: 0.7}  # 30,000 x 150,000: the best positives, all of them
TEXT_MS = 2.5
# What a part should reach of the speed that is measured beside it.
EXTRACT_OF_ENCODING, IMAGE_FILES_OF_ENCODING, ALIGN_OF_BARE_LOOP = 0.9, 0.8, 0.85
