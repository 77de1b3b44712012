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

from tracefl.config import Config
from tracefl.data.faults import flipped_label_counts
from tracefl.data.prepare import PreparedData
from tracefl.errors import TraceFLError
from tracefl.evaluation import feddebug
from tracefl.evaluation.attribution import COLUMNS, Settings, evaluate_rounds, trace_round
from tracefl.evaluation.stopwatch import Stopwatch
from tracefl.models import build_model, exchanged_state, initial_model, model_spec
from tracefl.report.console import LogFile, TrainingProgress, log_to_console, print_faulty, print_summary
from tracefl.report.figures import draw_run
from tracefl.report.files import (
    FEDDEBUG,
    PROVENANCE,
    read_answers,
    read_timings,
    update_timings,
    write_answers,
    write_csv,
    write_events,
)
from tracefl.report.lines import fusion_lines, provenance_lines
from tracefl.runs import ClientInfo, Run, locked, write_atomically
from tracefl.settings import fingerprint, run_folder, training_settings
from tracefl.states import State

LOG_FILE = "TraceFL_clients_contributions.log"
log = logging.getLogger("tracefl")


def run_experiment(config: Config, data: PreparedData, resolved: str) -> None:
    """Run one configuration; whatever a recorded run already holds is not computed again.

    Raises:
        TraceFLError: something that the user can mend; what was recorded stays.
    """
    log_to_console()
    folder = run_folder(config)
    faulty = {str(client) for client in config.faulty_clients_ids}
    initial = _initial_state(config, data, folder)
    with locked(folder), LogFile(folder / LOG_FILE):
        run = _open_run(config, data, folder, initial)
        write_atomically(folder / "config.yaml", resolved.encode())
        _train(config, data, run)
        rounds = pd.DataFrame([{"round": r.number, "loss": r.loss, "accuracy": r.accuracy} for r in run.rounds])
        if config.do_provenance:
            if config.parallel_processes > 0:
                torch.set_num_threads(config.parallel_processes)
            provenance = _trace(config, data, run)
            rounds = evaluate_rounds(run, provenance, config.provenance.methods, faulty)
            if faulty and config.do_feddebug and config.arch == "cnn":
                votes = _debug(config, data, run, faulty)
                rounds = rounds.merge(feddebug.judge_rounds(run, votes, faulty), on="round", how="left")
            if faulty:  # per localization, over all rounds
                timings = read_timings(folder).set_index("method")["seconds_per_localization"]
                timings = timings[[name for name in timings.index if name in (*config.provenance.methods, "FedDebug")]]
                rounds = rounds.assign(**{f"seconds_{str(name).lower()}": value for name, value in timings.items()})
            if config.convert_cache_to_csv:
                write_csv(folder / "provenance.csv", provenance)
            for line in provenance_lines(rounds, provenance, faulty):
                log.info(line)
        for line in fusion_lines(run, config.strategy.name):
            log.info(line)
        if config.noise_multiplier != -1:
            log.info(_privacy_line(config, len(run.rounds)))
        if config.do_provenance or not (folder / "rounds.csv").exists():
            write_csv(folder / "rounds.csv", rounds)
            write_events(folder / "tensorboard", rounds)
        if config.plotting:
            draw_run(folder)
    print_summary(rounds, config.provenance.methods)
    if faulty and config.do_provenance:
        print_faulty(rounds, config.provenance.methods, faulty)
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
    for stale in ("run.json", "rounds.csv"):
        (folder / stale).unlink(missing_ok=True)
    shutil.rmtree(folder / "rounds", ignore_errors=True)
    return Run.create(
        folder,
        initial=initial,
        clients=[
            ClientInfo(
                client,
                counts,
                flipped_label_counts(config, data, client),
                config.fault.kind if int(client) in config.faulty_clients_ids else None,
            )
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
    wanted, done = config.num_rounds, len(run.rounds)
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
        config.num_clients,
    )
    with TrainingProgress(wanted, config.clients_per_round, done) as progress:
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
        fault=config.fault.kind,
        target=config.fault.target,
        noise=max(config.noise_multiplier, 0) * config.clipping_norm,
    )
    key = _key(run, {**asdict(settings), "label2flip": sorted(settings.label2flip.items())})
    if config.check_prov_cache and (cached := read_answers(run.path / PROVENANCE, key)) is not None:
        return cached
    started, cpu, watch = time.perf_counter(), time.process_time(), Stopwatch()
    model = build_model(model_spec(config, data)).to(config.device)
    examples = data.server()
    tables = [trace_round(run, record.number, model, examples, settings, watch) for record in run.rounds]
    provenance = pd.concat([table for table in tables if len(table)] or [pd.DataFrame(columns=COLUMNS)])
    write_answers(run.path / PROVENANCE, provenance, key)
    update_timings(run.path, watch.table())
    log.info(
        "traced %d inputs in %.1f s (%.1f s of CPU)",
        len(provenance[["round", "input"]].drop_duplicates()), time.perf_counter() - started, time.process_time() - cpu,
    )  # fmt: skip
    return provenance


def _debug(config: Config, data: PreparedData, run: Run, faulty: set[str]) -> pd.DataFrame:
    """FedDebug's votes on every round."""
    threshold, picky = config.neuron_activation_threshold, not config.faster_input_generation
    key = _key(run, {"threshold": threshold, "picky": picky})
    if config.check_prov_cache and (cached := read_answers(run.path / FEDDEBUG, key)) is not None:
        return cached
    model, watch = build_model(model_spec(config, data)).to(config.device), Stopwatch()
    tables = [
        feddebug.debug_round(run, record.number, model, faulty, threshold, picky=picky, watch=watch)
        for record in run.rounds
    ]
    votes = pd.concat([table for table in tables if len(table)] or [pd.DataFrame(columns=feddebug.COLUMNS)])
    write_answers(run.path / FEDDEBUG, votes, key)
    update_timings(run.path, watch.table())
    return votes


def _privacy_line(config: Config, rounds: int) -> str:
    from tracefl.federation.privacy import TARGET_DELTA, epsilon

    spent = epsilon(config.noise_multiplier, rounds, config.clients_per_round, config.num_clients)
    return (
        f"Differential privacy of the parameters after {rounds} rounds: epsilon = {spent:.4g} at delta = "
        f"{TARGET_DELTA:g} (one client's updates against none); BatchNorm's running statistics are released as they are"
    )


def _key(run: Run, settings: dict[str, Any]) -> dict[str, str]:
    """What answers depend on: the recorded models and the settings."""
    return {"settings": fingerprint(settings), "models": fingerprint([asdict(r) for r in run.rounds])}
