"""SGLang's own bench_serving on requests of ours; runs in the server's environment.

    python sglang_client.py ROWS.json [flags of bench_serving]

ROWS.json is a list of {"input_ids", "image_data", "output_len"}. Only the source of the requests
is replaced; everything measured is bench_serving's own.
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace


def main() -> None:
    if find_spec("datasets") is None:  # imported by sglang for a dataset that is not used here
        sys.modules["datasets"] = SimpleNamespace(load_dataset=None)
    from sglang.benchmark import serving
    from sglang.benchmark.datasets.common import DatasetRow

    rows = json.loads(Path(sys.argv.pop(1)).read_text())
    requests = [
        DatasetRow(
            prompt=row["input_ids"],
            prompt_len=len(row["input_ids"]),
            output_len=row["output_len"],
            image_data=row["image_data"],
        )
        for row in rows
    ]
    serving.get_dataset = lambda *_, **__: requests
    serving.cli_main()


if __name__ == "__main__":
    main()
