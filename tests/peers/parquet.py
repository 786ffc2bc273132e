"""Writes tests/e2e/parquet: the same records as JSON lines, and as pandas and pyarrow write them as Parquet.

    pip install pandas pyarrow
    python3 tests/peers/parquet.py

`pandas.parquet` is the default of pandas, which is that of datasets: snappy, pages of version 1, dictionaries. A column of integers
with missing values is one of floating-point numbers there. `pyarrow.parquet` has zstd, pages of version 2, and several row groups.
"""

import json
import pathlib

import pandas
import pyarrow
import pyarrow.parquet

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "e2e" / "parquet"


def records():
    for number in range(60):
        yield {"prompt": f"What is {number} + {number}?", "answer": str(2 * number)}
        if number % 3 == 0:
            letter = "ABCD"[number % 4]
            system = [{"role": "system", "content": "Answer with a letter."}] if number % 2 else []
            messages = [*system, {"role": "user", "content": f"Größe {number}? (A) 1 (B) 2 (C) 3 (D) 4"}]
            yield {"messages": messages, "answer": letter, "check": "choice"}
        if number % 5 == 0:
            yield {"question": f"Tom has {number} eggs and buys 2. How many?", "answer": f"{number} + 2.\n#### {number + 2}"}
            yield {"problem": f"Expand $(x+{number})^2$.", "solution": f"It is $\\boxed{{x^2+{2 * number}x+{number ** 2}}}$."}
            yield {"nums": [number + 1, 2, 3], "target": number + 6}
            yield {"problem": f"Factor {number}.", "solution": "Try.", "answer": f"x - {number}", "level": number, "extra": None}
    yield {"prompt": "What is 0 + 0?", "answer": "0"}


def main():
    FOLDER.mkdir(exist_ok=True)
    rows = list(records())
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (FOLDER / "problems.jsonl").write_text(lines)
    pandas.DataFrame(rows).to_parquet(FOLDER / "pandas.parquet")
    names = dict.fromkeys(name for row in rows for name in row)
    table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
    options = dict(compression="zstd", data_page_version="2.0", row_group_size=50)
    pyarrow.parquet.write_table(table, FOLDER / "pyarrow.parquet", **options)


if __name__ == "__main__":
    main()
