"""Joins runs of closed_loop.py into one file with a row a line, and prints the tables for the model card.

    python models/train/merge_results.py OUT.json RUN.json...    rows of later files replace those of earlier ones
"""
import json
import sys

KEYS = ("device", "torch", "date", "table_dtype")


def lines(rows):
    return ",\n  ".join(json.dumps(r) for r in rows)


def main():
    out, paths = sys.argv[1], sys.argv[2:]
    families, greedy, runs = {}, {}, []
    for path in paths:
        with open(path) as f:
            content = json.load(f)
        runs.append({k: content[k] for k in KEYS})
        for row in content.get("greedy", {}).get("rows", []):
            greedy[row["task"]] = dict(row, seeds=content["greedy"]["seeds"])
        for family, table in content.items():
            if family == "greedy" or not isinstance(table, dict):
                continue
            head = {k: v for k, v in table.items() if k != "rows"}
            rows = families.setdefault(family, (head, {}))[1]
            families[family] = (head, rows)
            for row in table["rows"]:
                rows[row["policy"], row["budget_slots"]] = dict(row, open_loop=False)
    with open(out, "w") as f:
        f.write('{"runs": ' + json.dumps(runs) + ',\n "families": ' +
                json.dumps([head for head, _ in families.values()]) + ',\n "greedy": [\n  ' + lines(greedy.values()) +
                '],\n "rows": [\n  ' + lines(r for _, rows in families.values() for r in rows.values()) + "]}\n")
    for family, (head, rows) in sorted(families.items()):
        budgets = sorted({b for _, b in rows if b})
        full = rows["full", 0]
        print(f"\n**{family}**: prompt {head['prompt_mean']:.0f} tokens, right text {head['generated_mean']:.0f}; "
              f"full cache {full['correct']} of {full['n']}.\n")
        print("| policy | " + " | ".join(map(str, budgets)) + " |\n| --- |" + " --: |" * len(budgets))
        for policy in sorted({p for p, _ in rows if p != "full"}):
            cells = [rows.get((policy, b)) for b in budgets]
            texts = [f"{100 * c['accuracy']:.0f} ({100 * c['prefix_share']:.0f})" if c else "-" for c in cells]
            print(f"| `{policy}` | " + " | ".join(texts) + " |")


if __name__ == "__main__":
    main()
