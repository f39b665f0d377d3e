"""Real replays of forged work: of each cheat of tests/attacks, by which of its segments it is rejected.

A shard of the tiny model of the tests is trained by TrainChain's engine and forged in each way; every segment is
replayed from the state that was claimed, in the worker's own numeric class (equality is demanded) and in another (the
recipe's tolerance decides), and the verdict is the hub's. Twice: an fp32 job with fresh moments, a bf16 job that hands
them on. Prints one JSON document on stdout. Exits 0 whatever it finds.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import report
from launch import begin, log

sys.path.insert(0, str(Path(__file__).parents[1]))

PACKAGES = ("trainchain", "torch", "transformers", "numpy")
MEASURES = ("gradients", "squares", "delta", "length")


def main() -> int:
    begin("forgeries")
    parser = argparse.ArgumentParser(description="By which of its forged segments each cheat is rejected.")
    parser.add_argument("--quick", action="store_true", help="the fp32 job alone")
    given = parser.parse_args()
    figures: list[report.Figure] = []
    tables: dict[str, Any] = {}
    for precision in ("fp32",) if given.quick else ("fp32", "bf16"):
        with tempfile.TemporaryDirectory(prefix="trainchain-bench-", ignore_cleanup_errors=True) as temporary:
            tables[precision] = study(Path(temporary), precision, figures)
    report.write(report.document("forgeries", PACKAGES, {"quick": given.quick}, figures, **tables))
    return 0


def study(folder: Path, precision: str, figures: list[report.Figure]) -> dict[str, Any]:
    """Each cheat's verdicts by segment, and the least of its distances over its forged segments."""
    from tests.attacks import cheats
    from tests.attacks.conftest import make_scene_in

    scene = make_scene_in(folder, precision)
    lab, classes = scene.lab, {"own class": None, "other class": scene.other_class}
    low = {f"int{bits} base": cheats.on_another_base(lambda _, bits=bits: scene.variant(bits=bits)) for bits in (8, 4)}
    table: dict[str, Any] = {}
    caught = {name: [0, 0] for name in classes}
    wrongly = 0
    for name, cheat in {"honest": cheats.honest, **cheats.FULL, **cheats.PARTIAL, **low}.items():
        claim = cheat(lab)
        row: dict[str, Any] = {"forged": sorted(claim.forged), "of": lab.count}
        for where, engine in classes.items():
            found = [lab.decided(claim, segment, engine) == "audit.differs" for segment in range(lab.count)]
            row[f"rejected, {where}"] = [segment for segment, rejected in enumerate(found) if rejected]
            wrongly += sum(rejected for segment, rejected in enumerate(found) if segment not in claim.forged)
            if name != "int8 base":
                caught[where][0] += sum(found[segment] for segment in claim.forged)
                caught[where][1] += len(claim.forged)
        over = claim.forged or range(lab.count)
        apart = [lab.distances(claim, segment, scene.other_class) for segment in over]
        pick = min if claim.forged else max
        row["distances"] = {each: float(f"{pick(getattr(one, each) for one in apart):.3g}") for each in MEASURES}
        log.info("%s, %s: %s", precision, name, row)
        table[name] = row
    for name, (cheat, code) in cheats.STRUCTURAL.items():
        table[name] = {"verdict": code, "of": lab.count, "holds": set(lab.verdicts(cheat(lab))) == {code}}
    for where, (got, of) in caught.items():
        share = 100 * got / of
        told = f"{got} of {of}; without int8"
        figures.append(
            report.must(f"{precision}, {where}: forged segments rejected", share, "%", "100", got == of, peer=told)
        )
    figures.append(report.at_most(f"{precision}: honest segments rejected", wrongly, "segments", 0))
    structural = all(row["holds"] for row in table.values() if "holds" in row)
    figures.append(report.must(f"{precision}: structure tells without a replay", structural, "", "true", structural))
    return table


if __name__ == "__main__":
    raise SystemExit(main())
