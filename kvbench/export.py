"""Write a run's predictions in the formats that the benchmarks' own tools read, or its scores for a model card.

    python -m kvbench.export longbench RUN --out DIR     DIR/pred/<model>-<arm>/<dataset>.jsonl for the official eval.py
                                                         (LongBench-E: DIR/pred_e/...)
    python -m kvbench.export zeroscrolls RUN --out DIR   DIR/<model>-<arm>.csv for the leaderboard
    python -m kvbench.export kvpress RUN --out DIR       DIR/ruler__4096__<model>__<method>__<ratio>/..., its folders
    python -m kvbench.export model-index RUN --out DIR   DIR/<model>.md, a model card with the scores as metadata
    python -m kvbench.export eval-results RUN --out DIR  DIR/<model>/.eval_results/<arm>.yaml for a hub repository

RUN is a run folder; several of them (a sweep over data sets) are exported together. The last line printed is one JSON
document: the rows (or metrics) of each file.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from kvbench.arguments import parse
from kvbench.commands import command, strict_json
from kvbench.records.environment import environments, refuse_mixture
from kvbench.records.read import read_calls, read_records
from kvbench.results.exports import export_eval_results, export_longbench, export_model_index, export_zeroscrolls
from kvbench.results.kvpress_export import export_kvpress

EXPORTERS = {
    "longbench": export_longbench,
    "zeroscrolls": export_zeroscrolls,
    "kvpress": export_kvpress,
    "model-index": export_model_index,
    "eval-results": export_eval_results,
}


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = parse("export", arguments)
    if not options.mix_environments:
        records = [record for run in options.runs for record in read_records(run)]
        calls = [call for run in options.runs for call in read_calls(run)]
        refuse_mixture(environments(records, calls), "the export", "say that it may with --mix-environments")
    written = EXPORTERS[options.format](options.runs, options.out)
    print(strict_json({str(path): rows for path, rows in written.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
