"""One experiment from its configuration to its report: each stage returns what the next takes."""

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import nn

from tracefl.checks import check_examples, numbered_labels
from tracefl.config import Config
from tracefl.data.examples import Examples
from tracefl.data.faults import unchanged
from tracefl.data.prepare import prepare
from tracefl.data.prepared import PreparedData
from tracefl.errors import require
from tracefl.evaluation import feddebug, tracing
from tracefl.evaluation.metrics import Metric, judge_answers, judge_models, judge_times, wide
from tracefl.evaluation.selection import faulty_clients
from tracefl.evaluation.stopwatch import Stopwatch
from tracefl.evidence.verdict import audit_run, class_by_client, verdict_json
from tracefl.evidence.verdict import judge as judge_clients
from tracefl.evidence.whatif import removal_lines, whatif
from tracefl.federation.cluster import spread_over
from tracefl.federation.start import initial_state, open_or_create
from tracefl.models import build_model, model_spec
from tracefl.readonly import held
from tracefl.report import figures, lines, progress, tables, tracking, write_page
from tracefl.results import (
    AUDIT,
    CLASS_BY_CLIENT,
    CONFIG,
    FEDDEBUG,
    LAYERS,
    PROVENANCE,
    ROUNDS,
    TIMINGS,
    VERDICT,
    WHOLE_RUN,
    cached,
    intact,
    read_timings,
    write_layers,
    write_result,
    write_table,
)
from tracefl.runs import Run
from tracefl.settings import run_folder, training_settings
from tracefl.storage import disk_line
from tracefl.training import keep_freed_memory

LOG_FILE = "TraceFL_clients_contributions.log"
log = logging.getLogger("tracefl")
Simulate = Callable[[Config, Callable[[Any], None]], None]


def run_experiment(config: Config, resolved: str, simulate: Simulate | None = None) -> None:
    """Run one configuration; what is already recorded is not computed again.

    Args:
        config: the checked configuration.
        resolved: the same as YAML, kept as config.yaml.
        simulate: called with the configuration and what is to be done with a grid, where rounds are
            to be trained; None: Flower's simulation here.

    Raises:
        TraceFLError: something that the user can correct; what was recorded before is kept.
    """
    tracking.wanted(config)  # before anything is trained
    data = prepare(config)
    folder = run_folder(config)
    check_examples(config, data.label_counts)
    config, notes = numbered_labels(config, data.class_names)
    idle = unchanged(config, data)
    told = f"faulty_clients_ids: {', '.join(idle)} hold nothing that fault.kind={config.fault.kind} changes"
    require(not idle or len(idle) < len(config.faulty_clients_ids), f"{told}: name others, or other labels to flip.")
    notes = [*data.notes, *notes, *([f"{told}, and train as honest clients"] if idle else [])]
    notes += lines.data_lines(config, data)
    notes += lines.exclusion_lines(config, data)
    if not (config.do_training or config.do_provenance):
        print(*notes, sep="\n")
        print(f"{data.folder} is prepared; do_training=false and do_provenance=false leave it at that")
        return
    progress.log_to_console()
    keep_freed_memory()
    initial = initial_state(config, data, folder)  # may fail: before the folder is there
    with held(folder, config.num_rounds) as folder, progress.log_to_file(folder / LOG_FILE):
        for note in notes:
            log.info(note)
        run = open_or_create(config, data, folder, initial)
        run.check_header(settings=training_settings(config))
        write_result(folder, CONFIG, resolved.encode())
        model, examples = build_model(model_spec(config, data)).to(config.device), data.server()
        train(config, data, run, model, examples, simulate)
        for line in lines.storage_lines(run):
            log.info(line)
        audited = audit(config, run, model, examples)
        answers = trace(config, run, model, examples)
        whole = trace_whole(config, run, model, examples)
        votes = debug(config, run, model)
        metrics = judge(config, run, answers, votes)
        if audited is not None:
            accuse(run, audited, model, examples)
        if whole is not None and len(whole):
            tables.print_whole_run(whole)
        report(config, run, answers, metrics)
        if config.report:
            log.info("The run's page: %s", write_page(run.path))
        tables.print_summary(metrics, config.provenance.methods)
        if config.do_provenance and config.faulty_clients_ids:
            tables.print_faulty(metrics, config.provenance.methods, faulty_clients(config))
        tracking.log_run(config, run.path)
    if folder.parent == run_folder(config).parent:
        log.info("Everything is in %s: run.json, rounds.csv, provenance.parquet, %s, rounds/", folder, LOG_FILE)


def train(
    config: Config,
    data: PreparedData,
    run: Run,
    model: nn.Module,
    examples: Examples,
    simulate: Simulate | None = None,
) -> None:
    """Train the rounds that the run lacks. Arguments as of `serve` and `run_experiment`."""
    wanted, done = config.num_rounds, len(run.rounds)
    if done == wanted:
        log.info("%s: all %d rounds are recorded, nothing is trained", run.path, done)
        return
    require(config.do_training, f"do_training=false needs {wanted} recorded rounds, got {done}: set do_training=true")
    from tracefl.federation.server_app import serve  # brings Flower and Ray
    from tracefl.federation.simulation import simulate as simulate_here

    count = config.num_clients - len(config.exclude_clients)
    log.info("%s: training rounds %d to %d with %d clients", run.path, done + 1, wanted, count)
    with progress.TrainingProgress(wanted, config.clients_per_round, done) as shown:
        observers = {"on_client": shown.on_client, "on_round": shown.on_round}
        (simulate or simulate_here)(config, lambda grid: serve(grid, config, data, run, model, examples, **observers))


def audit(config: Config, run: Run, model: nn.Module, examples: Examples) -> pd.DataFrame | None:
    """What every client did in every round (`verdict.COLUMNS`); None where no verdict is wanted."""
    if not (config.do_provenance and config.do_audit):
        return None

    def make() -> pd.DataFrame:
        started = time.perf_counter()
        with spread_over(config) as spread, progress.bar("auditing rounds", len(run.kept_rounds)) as done:
            table = audit_run(run, model=model, examples=examples, spread=spread, on_round=done)
        log.info("audited %d updates in %.1f s", len(table), time.perf_counter() - started)
        return table

    return cached(run, AUDIT, [], make, reuse=config.check_prov_cache)


def accuse(run: Run, audited: pd.DataFrame, model: nn.Module, examples: Examples) -> None:
    """Log the verdict and what removing the faulty clients would give, and write both."""
    names = run["class_names"]
    verdict, removal = judge_clients(audited, names), None
    for line in verdict.lines():
        log.info(line)
    if verdict.faulty:
        since = run.kept_rounds[0].number
        removal = whatif(run, verdict.faulty, since=since, memory=0.5, examples=examples, model=model)
        for line in removal_lines(removal):
            log.info(line)
    told = removal.as_json() if removal is not None else None
    write_result(run.path, VERDICT, verdict_json(verdict, told))
    write_table(run.path, CLASS_BY_CLIENT, class_by_client(audited, names).reset_index())


def trace(config: Config, run: Run, model: nn.Module, examples: Examples) -> pd.DataFrame | None:
    """The answers of every round (`tracing.COLUMNS`); None if do_provenance=false."""
    if not config.do_provenance:
        return None
    if config.parallel_processes > 0:
        torch.set_num_threads(config.parallel_processes)

    def make() -> pd.DataFrame:
        started, cpu = time.perf_counter(), time.process_time()
        by_layer = list[pd.DataFrame]()
        with spread_over(config) as spread:
            one_round = partial(tracing.trace_round, config, run, model, examples, layers=by_layer, spread=spread)
            answers = _every_round("tracing rounds", run, one_round)
        write_layers(run, by_layer)
        inputs, seconds = answers[["round", "input"]].drop_duplicates(), time.perf_counter() - started
        log.info("traced %d inputs in %.1f s (%.1f s of CPU)", len(inputs), seconds, time.process_time() - cpu)
        return answers

    settings = [_of_rounds(config), config.enable_beta, config.client_weights_normalization]
    settings += [vars(config.evaluation)] if config.evaluation.coalitions else []
    reuse = config.check_prov_cache and intact(run.path, LAYERS) is not None
    return cached(run, PROVENANCE, settings, make, reuse=reuse)


def trace_whole(config: Config, run: Run, model: nn.Module, examples: Examples) -> pd.DataFrame | None:
    """The answers over all rounds (`tracing.COLUMNS`); None unless provenance.scope=run."""
    if not (config.do_provenance and config.provenance.scope == "run"):
        return None

    def make() -> pd.DataFrame:
        log.info("tracing over all %d rounds; provenance.proxies=1 takes the fewest trainings", len(run.rounds))
        with progress.bar("tracing over all rounds"):
            answers, memory = tracing.trace_whole_run(config, run, model, examples)
        log.info("traced %d inputs over all %d rounds: %s", answers["input"].nunique(), len(run.rounds), memory)
        return answers

    settings = [_of_rounds(config), config.provenance.proxies]
    return cached(run, WHOLE_RUN, settings, make, reuse=config.check_prov_cache)


def _of_rounds(config: Config) -> dict[str, Any]:
    """What the answers depend on, whether the whole run is traced or not."""
    return {name: value for name, value in vars(config.provenance).items() if name not in ("scope", "proxies")}


def debug(config: Config, run: Run, model: nn.Module) -> pd.DataFrame | None:
    """FedDebug's votes of every round (`feddebug.COLUMNS`); None where it is not to run."""
    if not (config.do_provenance and config.faulty_clients_ids and config.do_feddebug and config.arch == "cnn"):
        return None
    make = partial(_every_round, "FedDebug on rounds", run, partial(feddebug.debug_round, config, run, model))
    settings = [config.neuron_activation_threshold, config.faster_input_generation]
    return cached(run, FEDDEBUG, settings, make, reuse=config.check_prov_cache)


def judge(config: Config, run: Run, answers: pd.DataFrame | None, votes: pd.DataFrame | None) -> pd.DataFrame:
    """All metrics as tidy rows; only the global model's if nothing was traced."""
    metrics, methods, faulty = judge_models(run), config.provenance.methods, faulty_clients(config)
    if answers is not None:
        metrics += judge_answers(run, answers, methods, faulty)
    if votes is not None:
        metrics += feddebug.judge_votes(run, votes, faulty)
    if answers is not None and faulty:
        metrics += judge_times(run, read_timings(run.path), [*methods, "FedDebug"])
    return pd.DataFrame(metrics, columns=Metric._fields)


def report(config: Config, run: Run, answers: pd.DataFrame | None, metrics: pd.DataFrame) -> None:
    """Log the lines, and write rounds.csv and the figures."""
    if answers is not None:
        if config.convert_cache_to_csv:
            write_table(run.path, "provenance.csv", answers)
        gone = {record.number for record in run.rounds if not record.kept}
        for line in lines.provenance_lines(metrics, answers, faulty_clients(config), gone):
            log.info(line)
    for line in (*lines.fusion_lines(run, config.strategy.name), *lines.privacy_lines(config, len(run.rounds))):
        log.info(line)
    log.info(disk_line(run.disk()))
    timings = read_timings(run.path)
    if len(timings):
        write_table(run.path, TIMINGS, timings)
    if answers is not None or intact(run.path, ROUNDS) is None:
        write_table(run.path, ROUNDS, wide(metrics))
    if config.plotting:
        figures.draw_run(run.path)


def _every_round(doing: str, run: Run, one_round: Callable[[int, Stopwatch], pd.DataFrame]) -> pd.DataFrame:
    """The tables of all rounds that can be traced as one; `attrs["timings"]`: what they took."""
    watch, tables = Stopwatch(), list[pd.DataFrame]()
    with progress.bar(doing, len(run.kept_rounds)) as done:
        for record in run.kept_rounds:
            tables.append(one_round(record.number, watch))
            done()
    table = pd.concat([table for table in tables if len(table)] or tables[:1])
    table.attrs["timings"] = watch.rows()
    return table
