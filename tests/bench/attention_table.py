"""The attention bench beside its peers: one line a shape, times in us, with the targets that they are held to.

Usage: attention_table.py attention.jsonl peers.jsonl [fp8.jsonl]
"""

import json
import os
import sys


def read(path):
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return [json.loads(line) for line in file if line.strip()]


def target(kv_bytes, device):
    """(ratio to the best peer, share of the read ceiling or None)"""
    for limit, ratio, share in ((10e6, 0.6 if "H200" in device else 0.7, None), (40e6, 0.75, 0.45), (150e6, 0.9, 0.78), (400e6, 0.97, 0.89),
                                (2e9, 1.0, 0.93)):
        if kv_bytes < limit:
            return ratio, share
    return 1.02, 0.95


def print_fp8(rows):
    """The step over fp8 K and V beside the same over bf16, of one run."""
    table = {}
    for r in rows:
        table.setdefault((r["batch"], r["slots"]), {})[(r["dtype"], r["variant"])] = r
    print("\nfp8 K and V, us; bf16 MB; ratio = fp8 / bf16, both per head (target 0.62 where bf16 moves over 200 MB)")
    print("   B     S     MB  floor     PH     SH     AO   bf16 ratio")
    for (batch, slots), v in table.items():
        us = [v.get(key, {}).get("median_us", float("nan")) for key in
              (("fp8", "victim_per_head"), ("fp8", "victim_shared"), ("fp8", "attention_only"), ("bf16", "victim_per_head"))]
        if ("fp8", "victim_per_head") not in v:
            continue
        row = v[("fp8", "victim_per_head")]
        ratio, large = us[0] / us[3], 2 * row["kv_bytes"] > 200e6
        print(f"{batch:4d} {slots:5d} {2 * row['kv_bytes'] / 1e6:6.0f} {row['floor_us']:6.1f} {us[0]:6.1f} {us[1]:6.1f} {us[2]:6.1f} "
              f"{us[3]:6.1f} {ratio:5.2f} {'met' if ratio <= 0.62 else 'missed' if large else ''}")


def print_peers(peers):
    """Every peer beside the others, us, '-' where one was not timed."""
    names = list(dict.fromkeys(p["peer"] for p in peers))
    table = {}
    for p in peers:
        table.setdefault((p["dtype"], p["batch"], p["slots"]), {})[p["peer"]] = p["median_us"]
    print("\nevery peer, us\n dtype    B     S " + " ".join(f"{name:>17}" for name in names))
    for (dtype, batch, slots), us in table.items():
        print(f"{dtype:>6} {batch:4d} {slots:5d} " +
              " ".join(f"{us[name]:17.1f}" if name in us else f"{'-':>17}" for name in names))


def main():
    rows, peers = read(sys.argv[1]), read(sys.argv[2])
    if not rows:
        sys.exit("no rows of the attention bench")
    best = {}
    for p in peers:
        key = (p["dtype"], p["batch"], p["slots"])
        if key not in best or p["median_us"] < best[key][0]:
            best[key] = (p["median_us"], p["peer"])
    table = {}
    for r in rows:
        table.setdefault((r["dtype"], r["batch"], r["slots"]), {})[r["variant"]] = r
    print(f"{rows[0]['device']}, read ceiling {rows[0]['read_ceiling_gbps']:.0f} GB/s; share = floor / per-head time;"
          " PH per head, SH shared victim, AO attention only, NO without overlap, CP cp.async")
    print(" dtype    B     S     MB sp  floor     PH     SH     AO     NO     CP |   peer                   ratio share | target met")
    for (dtype, batch, slots), v in table.items():
        main_row = v["victim_per_head"]
        us = {short: v.get(name, {}).get("median_us", float("nan")) for short, name in
              (("PH", "victim_per_head"), ("SH", "victim_shared"), ("AO", "attention_only"),
               ("NO", "victim_per_head_no_overlap"), ("CP", "victim_per_head_cp_async"))}
        peer_us, peer = best.get((dtype, batch, slots), (float("nan"), "-"))
        want_ratio, want_share = target(main_row["kv_bytes"], rows[0]["device"])
        ratio, share = us["PH"] / peer_us, main_row["share_of_ceiling"]
        met = ("R" if ratio <= want_ratio else "-") + ("" if want_share is None else "S" if share >= want_share else "-")
        print(f"{dtype:>6} {batch:4d} {slots:5d} {main_row['kv_bytes'] / 1e6:6.0f} {main_row['splits']:2d} "
              f"{main_row['floor_us']:6.1f} {us['PH']:6.1f} {us['SH']:6.1f} {us['AO']:6.1f} {us['NO']:6.1f} {us['CP']:6.1f} | "
              f"{peer_us:6.1f} {peer:<17} {ratio:5.2f} {share:5.2f} | {want_ratio:.2f} {want_share or 0:.2f} {met}")
    if peers:
        print_peers(peers)
    if len(sys.argv) > 3 and os.path.exists(sys.argv[3]):
        print_fp8(read(sys.argv[3]))


if __name__ == "__main__":
    main()
