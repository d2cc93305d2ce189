"""The demo: a small character transformer trained with torch's dropout and with ours, side by side on the same batches.

Run it with `make demo SOURCE=URI` or `python -m everett_cuda.demo --source URI`. One file a step: `text` (what is
read), `model`, `budget` (are there bits enough), `train`, `sample` (characters chosen by direct bits), `report` (plot
and table), `__main__` (the command).
"""
