"""Parquet from CSV on stdin: `kvlapse export --format parquet` runs this with python3 and pyarrow (pip install pyarrow).

    python3 csv_to_parquet.py OUT.parquet < rows.csv
"""

import sys

try:
    import pyarrow.csv
    import pyarrow.parquet
except ImportError:
    sys.exit("pyarrow is missing: pip install pyarrow")

table = pyarrow.csv.read_csv(sys.stdin.buffer, parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True))
pyarrow.parquet.write_table(table, sys.argv[1], compression="zstd")
