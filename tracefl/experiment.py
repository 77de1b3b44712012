"""One experiment on prepared data: train, trace, evaluate, report."""

import logging
import platform
import shutil
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from tracefl.config import Config, fingerprint, run_folder, training_settings
from tracefl.data.prepare import PreparedData
from tracefl.errors import TraceFLError
from tracefl.evaluation.attribution import COLUMNS, Settings, evaluate_rounds, trace_round
from tracefl.models import build_model, exchanged_state, initial_model, model_spec
from tracefl.report.console import LogFile, TrainingProgress, log_to_console, print_summary
from tracefl.report.figures import draw_run
from tracefl.report.files import read_provenance, write_csv, write_events, write_provenance
from tracefl.report.lines import provenance_lines
from tracefl.runs import ClientInfo, Run, State, locked, write_atomically

LOG_FILE = "TraceFL_clients_contributions.log"
log = logging.getLogger("tracefl")


def run_experiment(config: Config, data: PreparedData, resolved: str) -> None:
    """Run one configuration; whatever a recorded run already holds is not computed again.

    Raises:
        TraceFLError: something that the user can mend; what was recorded stays.
    """
    log_to_console()
    folder = run_folder(config)
    initial = _initial_state(config, data, folder)
    with locked(folder), LogFile(folder / LOG_FILE):
        run = _open_run(config, data, folder, initial)
        write_atomically(folder / "config.yaml", resolved.encode())
        _train(config, data, run)
        rounds = pd.DataFrame([{"round": r.number, "loss": r.loss, "accuracy": r.accuracy} for r in run.rounds])
        if config.do_provenance:
            provenance = _trace(config, data, run)
            faulty = {str(client) for client in config.faulty_clients_ids}
            rounds = evaluate_rounds(run, provenance, config.provenance.methods, faulty)
            if config.convert_cache_to_csv:
                write_csv(folder / "provenance.csv", provenance)
            for line in provenance_lines(rounds, provenance, faulty):
                log.info(line)
        if config.do_provenance or not (folder / "rounds.csv").exists():
            write_csv(folder / "rounds.csv", rounds)
            write_events(folder / "tensorboard", rounds)
        if config.plotting:
            draw_run(folder)
    print_summary(rounds, config.provenance.methods)
    log.info("Everything is in %s: run.json, rounds.csv, provenance.parquet, %s, rounds/", folder, LOG_FILE)


def _initial_state(config: Config, data: PreparedData, folder: Path) -> State | None:
    """The initial model of a run that starts anew; None if a recorded one is there to go on with."""
    if (folder / "run.json").exists() and (config.check_train_cache or not config.do_training):
        return None
    if not config.do_training:
        raise TraceFLError(f"do_training=false: {folder} holds no recorded run; set do_training=true once.")
    torch.manual_seed(config.seed)
    return exchanged_state(initial_model(config, data))


def _open_run(config: Config, data: PreparedData, folder: Path, initial: State | None) -> Run:
    """The recorded run of these settings, or a new one that starts from `initial`."""
    if initial is None:
        run = Run.open(folder)
        if run["data_sha256"] != data.digest:
            raise TraceFLError(
                f"{folder} was trained on other data than dataset.name={config.dataset.name} gives now: choose "
                "another exp_key, or set check_train_cache=false to train it again."
            )
        return run
    (folder / "run.json").unlink(missing_ok=True)
    shutil.rmtree(folder / "rounds", ignore_errors=True)
    return Run.create(
        folder,
        initial=initial,
        clients=[
            ClientInfo(client, counts, data.flipped_label_counts(config, client))
            for client, counts in data.label_counts.items()
        ],
        seed=config.seed,
        data_sha256=data.digest,
        class_names=data.class_names,
        settings=training_settings(config),
        versions={"python": platform.python_version()}
        | {package: version(package) for package in ("tracefl", "torch", "flwr", "flwr-datasets")},
    )


def _train(config: Config, data: PreparedData, run: Run) -> None:
    wanted, done = config.strategy.num_rounds, len(run.rounds)
    if done == wanted:
        log.info("%s: all %d rounds are recorded, nothing is trained", run.path, done)
        return
    if not config.do_training:
        raise TraceFLError(f"do_training=false: {run.path} holds {done} of {wanted} rounds; set do_training=true.")
    from tracefl.federation.server_app import serve  # Flower and Ray: only when there is something to train
    from tracefl.federation.simulation import simulate

    log.info(
        "%s: training rounds %d to %d with %d clients",
        run.path,
        done + 1,
        wanted,
        config.data_dist.num_clients,
    )
    with TrainingProgress(wanted, config.strategy.clients_per_round, done) as progress:
        simulate(
            config,
            lambda grid: serve(grid, config, data, run, on_client=progress.on_client, on_round=progress.on_round),
        )


def _trace(config: Config, data: PreparedData, run: Run) -> pd.DataFrame:
    settings = Settings(
        methods=config.provenance.methods,
        inputs_per_label=config.provenance.inputs_per_label,
        max_mispredictions=config.provenance.max_mispredictions,
        layer_decay=0.9 if config.enable_beta else 1.0,
        weighted=config.client_weights_normalization,
        label2flip=config.label2flip,
        faulty=[str(client) for client in config.faulty_clients_ids],
    )
    key: dict[str, Any] = {
        "settings": fingerprint(_plain(settings)),
        "models": fingerprint([asdict(r) for r in run.rounds]),
    }
    if config.check_prov_cache and (cached := read_provenance(run.path, key)) is not None:
        return cached
    if config.parallel_processes > 0:
        torch.set_num_threads(config.parallel_processes)
    started, cpu = time.perf_counter(), time.process_time()
    model = build_model(model_spec(config, data)).to(config.device)
    examples = data.server()
    tables = [trace_round(run, record.number, model, examples, settings) for record in run.rounds]
    provenance = pd.concat([table for table in tables if len(table)] or [pd.DataFrame(columns=COLUMNS)])
    write_provenance(run.path, provenance, key)
    log.info(
        "traced %d inputs in %.1f s (%.1f s of CPU)",
        len(provenance[["round", "input"]].drop_duplicates()), time.perf_counter() - started, time.process_time() - cpu,
    )  # fmt: skip
    return provenance


def _plain(settings: Settings) -> dict[str, Any]:
    return {**asdict(settings), "label2flip": sorted(settings.label2flip.items())}
