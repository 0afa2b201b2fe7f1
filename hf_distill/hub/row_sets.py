"""A row set as a data repository: its configs, and a card that tells where every part of it comes from."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import read_json, write_json, write_text
from .cards import on_hub, template_path
from .manifest import artefacts, code_version, versions
from .push import MANIFEST


if TYPE_CHECKING:
    from ..data import RowSet


def write_row_repository(
    rows: RowSet,
    folder: Path,
    repo_id: str,
    name: str,
    *,
    manifest: Path | None = None,
    num_negatives: int | None = None,
    template: str | None = None,
) -> Path:
    """Writes what a row set's repository holds: see [`share_rows`] for the data, and a card.

    Args:
        rows: The row set.
        folder: An empty folder.
        repo_id: The repository's id, for the card.
        name: Of the full row set.
        manifest: The `run_manifest.json` of the run that made the rows.
        num_negatives: Of the rows for sentence-transformers and PyLate; see [`negatives_for_all`].
        template: How title and text of a passage become one string; by default as the retriever read them.
    """
    from ..data.sharing import margin_histogram, share_rows
    from ..passages import DEFAULT_TEMPLATE

    template = template or _retriever(rows.metadata).get("template") or DEFAULT_TEMPLATE
    facts = share_rows(rows, folder, name, num_negatives=num_negatives, template=template)
    if manifest is not None and manifest.is_file():
        run = read_json(manifest)
        shutil.copyfile(manifest, folder / name / MANIFEST)
    else:  # rows that were made in a program
        run = {"versions": versions(), "code": code_version(), "data": {"rows": {"provenance": rows.metadata}}}
    histograms = [
        (f"Margins by `{column}`", margin_histogram(rows, column))
        for column in rows.score_columns
        if column != "retriever_scores"
    ]
    margins = rows.metadata.get("mining", {}).get("margins")
    if margins:
        histograms.append(("Margins at mining", margins))
    _write_card(rows, folder, repo_id, name, facts, run, template, dict(histograms))
    write_json(folder / MANIFEST, {**run, "artefacts": artefacts(folder)})
    return folder


def _retriever(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """Who found the negatives; of several row sets in one, who found those of the first."""
    if "teleport" in metadata:
        return metadata["teleport"]["miner"]
    first = metadata["pools"][0] if metadata.get("pools") else metadata
    return first.get("mining", {}).get("retriever", {})


def _write_card(
    rows: RowSet,
    folder: Path,
    repo_id: str,
    name: str,
    facts: Mapping[str, Any],
    run: Mapping[str, Any],
    template: str,
    histograms: Mapping[str, Mapping[str, list]],
) -> None:
    from huggingface_hub import DatasetCard, DatasetCardData

    metadata = rows.metadata
    sources = on_hub([str(one["name"]) for one in run.get("sources", ()) if one.get("kind") == "data"])
    scored = "scores" in rows.columns
    tags = ["hf_distill", "sentence-transformers", "hard-negatives", *(["knowledge-distillation"] if scored else [])]
    card_data = DatasetCardData(
        task_categories=["text-retrieval", "text-ranking"],
        tags=tags,
        size_categories=[_size_category(facts["equal_rows"])],
        pretty_name=repo_id.split("/")[-1],
        source_datasets=sources or None,
        configs=facts["configs"],
    )
    notes = []
    if facts["left_out"]:
        notes.append(
            f"{facts['left_out']:,} of the {facts['rows']:,} rows of `{name}` have no positive or fewer than "
            f"{facts['num_negatives']} negatives and are not in `train`; a row with several positives is there "
            "once for each."
        )
    card = DatasetCard.from_template(
        card_data,
        template_path=str(template_path("rows")),
        title=repo_id.split("/")[-1],
        summary=f"{_summary(metadata)} Ids and texts apart: a row names its documents, each text is there once.",
        repo_id=repo_id,
        name=name,
        scored=scored,
        columns=", ".join(f"`{column}`" for column in rows.columns),
        notes=" ".join(notes),
        usage=_usage(repo_id),
        provenance=_provenance_lines(rows, run, template),
        episodes=_episodes_table(metadata) if "teleport" in metadata else None,
        histograms=[{"title": title, "table": _table(one)} for title, one in histograms.items() if one["counts"]],
        **{key: f"{facts[key]:,}" for key in ("equal_rows", "rows", "queries", "documents")},
        num_negatives=facts["num_negatives"],
    )
    write_text(folder / "README.md", str(card))


def _usage(repo_id: str) -> str:
    loads = "\n".join(
        f'{name} = load_dataset("{repo_id}", "{name}", split="train")' for name in ("train", "queries", "documents")
    )
    return (
        "from datasets import load_dataset\nfrom sentence_transformers.util import resolve_ids\n\n"
        f'{loads}\ntrain.set_transform(resolve_ids({{"query_id": queries, "document_ids": documents}}))'
    )


def _summary(metadata: Mapping[str, Any]) -> str:
    collection, mining, episode = metadata.get("collection"), metadata.get("mining"), metadata.get("teleport")
    where = f" of *{collection}*" if collection else ""
    if episode:
        return f"Negatives of episode {episode['episode']} of ANCE-Tele for queries{where}."
    if mining:
        return f"Hard negatives for queries{where}, found by `{_name(_retriever(metadata))}`."
    return f"Training rows for queries{where}."


def _name(maker: Mapping[str, Any]) -> str:
    return str(maker.get("model") or maker.get("name") or "unknown")


def _maker(maker: Mapping[str, Any]) -> str:
    """A model as far as it decides the result, in a line."""
    parts = [f"`{_name(maker)}`"]
    if maker.get("revision"):
        parts.append(f"revision `{maker['revision']}`")
    if maker.get("weights"):
        parts.append(f"weights `{maker['weights']}`")
    for key in ("dtype", "query_length", "passage_length", "query_prompt", "passage_prompt", "template", "storage"):
        if maker.get(key):
            parts.append(f"{key.replace('_', ' ')} `{maker[key]}`")
    return ", ".join(parts)


def _provenance(rows: RowSet, run: Mapping[str, Any], template: str | None) -> list[tuple[str, str]]:
    metadata, lines = rows.metadata, []
    mining = metadata.get("mining", {})
    for one in run.get("sources", ()):
        if one.get("kind") == "data":
            at = f" at `{one['revision']}`" if one.get("revision") else ""
            lines.append(("Collection", f"`{one['name']}`{at}, split `{metadata.get('split')}`"))
    lines.append(
        ("Fingerprints", f"queries `{rows.queries.fingerprint}`, corpus `{rows.corpus.fingerprint}`, rows "
         f"`{rows.fingerprint}`"),
    )  # fmt: skip
    if "teleport" in metadata:
        for episode in episodes_of(metadata):
            lines.append((f"Retriever of episode {episode['episode']}", _maker(episode["miner"])))
    elif mining:
        lines += _mined(mining)
    elif metadata.get("pools"):
        for number, pool in enumerate(metadata["pools"], start=1):
            lines += [(f"Row set {number}: {label}", value) for label, value in _mined(pool.get("mining", {}))]
    elif metadata.get("made_by"):
        lines.append(("Made by", str(metadata["made_by"])))
    for column, teacher in metadata.get("teachers", {}).items():
        lines.append((f"Teacher of `{column}`", _maker(teacher)))
    if template:
        lines.append(("Passages rendered as", f"`{template}`"))
    seeds = run.get("seeds") or {}
    if seeds:
        lines.append(("Seeds", ", ".join(f"{name} {value}" for name, value in seeds.items())))
    if run.get("versions"):
        code = run.get("code") or run["versions"].get("hf_distill")
        lines.append(("Code", f"hf_distill {run['versions'].get('hf_distill')}, `{code}`"))
    return lines


def _mined(mining: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How negatives were found, filtered and drawn; nothing for those that were not mined."""
    if not mining:
        return []
    retriever = mining["retriever"]
    first, last = mining["window"]
    index = retriever.get("index", "exact" if retriever.get("name") != "run" else "a run")
    limits = {key: mining[key] for key in ("margin", "relative_margin", "max_score", "min_score")}
    filters = ", ".join(f"{key} {value}" for key, value in limits.items() if value is not None) or "none"
    judge = f", judged by {_maker(mining['filter_teacher'])}" if mining.get("filter_teacher") else ""
    return [
        ("Retriever", _maker(retriever)),
        ("Index, depth, window", f"{index}, {mining['depth']}, ranks {first} to {last}"),
        ("Filter", f"{filters}{judge}; {mining['filtered_by_score']:,} candidates dropped"),
        ("Positives removed from the results", f"{mining['positives_removed']:,}"),
        ("Sampling", f"{mining['sampling']}, at most {mining['num_negatives']} a query, seed {mining['seed']}"),
    ]


def episodes_of(metadata: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What is known of the episodes whose negatives a pool holds, the first one first."""
    episodes, one = [], metadata.get("teleport")
    while one:
        episodes.insert(0, one)
        one = one.get("previous")
    return episodes


def _episodes_table(metadata: Mapping[str, Any]) -> str:
    lines = [
        "| source | retriever | index | depth | most for a query | negatives | positives removed | seed |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for episode in episodes_of(metadata):
        miner = episode["miner"]
        for source, drawn in episode.get("sources", {}).items():
            most = episode["query_negatives" if source.startswith("query@") else "positive_negatives"]
            removed = f"{drawn['positives_removed']:,}"
            if "answers_removed" in drawn:
                removed += f", and {drawn['answers_removed']:,} with an answer"
            cells = [f"`{source}`", f"`{_name(miner)}`", str(miner.get("index", "BM25")), str(episode["depth"])]
            cells += [str(most), f"{drawn['negatives']:,}", removed, str(episode["seed"])]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_pool_card(rows: RowSet, folder: Path) -> None:
    """Writes the card of an episode's saved pool as `README.md`: where its negatives come from, episode by episode."""
    from huggingface_hub import DatasetCard, DatasetCardData

    run = read_json(folder / MANIFEST)
    sources = on_hub([str(one["name"]) for one in run.get("sources", ()) if one.get("kind") == "data"])
    title = folder.resolve().name
    card = DatasetCard.from_template(
        DatasetCardData(
            task_categories=["text-retrieval"],
            tags=["hf_distill", "hard-negatives", "ance-tele"],
            pretty_name=title,
            source_datasets=sources or None,
        ),
        template_path=str(template_path("pool")),
        title=title,
        summary=_summary(rows.metadata),
        rows=f"{len(rows):,}",
        negatives=f"{rows.metadata['teleport']['negatives']:,}",
        columns=", ".join(f"`{column}`" for column in rows.columns),
        episodes=_episodes_table(rows.metadata),
        provenance=_provenance_lines(rows, run, _retriever(rows.metadata).get("template")),
    )
    write_text(folder / "README.md", str(card))


def _provenance_lines(rows: RowSet, run: Mapping[str, Any], template: str | None) -> str:
    return "\n".join(f"- {label}: {value}" for label, value in _provenance(rows, run, template))


def _table(histogram: Mapping[str, list]) -> str:
    """Positive score minus negative score; a negative margin means a negative that is scored above the positive."""
    edges, counts = histogram["edges"], histogram["counts"]
    highest = max(counts) or 1
    lines = ["| lowest positive minus negative | negatives | |", "| ---: | ---: | --- |"]
    for low, high, count in zip(edges, edges[1:], counts):
        lines.append(f"| {low:.4g} to {high:.4g} | {count:,} | {'█' * round(20 * count / highest)} |")
    return "\n".join(lines)


def _size_category(number: int) -> str:
    for limit, name in ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M")):
        if number < limit:
            return name
    return "1M<n<10M" if number < 10**7 else "10M<n<100M"
