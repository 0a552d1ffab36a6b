"""The pages about a language model: report.html of a run, components.html of a site."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from torch import Tensor

from spd_fast._files import write_bytes
from spd_fast.evaluate.components import Context, Harvest, harvest
from spd_fast.experiments.language import LanguageRun
from spd_fast.report import curves
from spd_fast.report.facts import duration, number
from spd_fast.report.page import MASKS, Album
from spd_fast.report.style import (
    LIGHT_AND_DARK,
    SEQUENTIAL,
    Picture,
    axes_at,
    drawing,
    few_ticks,
    figure,
    legend_below,
    log_axis,
    series,
    steps_axis,
    style,
    svg,
)
from spd_fast.train.config import LanguageConfig

__all__ = ["language_seeds_table", "language_table", "write_components", "write_language_report"]

# Components of each site in a run's report; `spd-fast components` shows more.
REPORTED = 3
Text = Callable[[int], str]


@dataclass(frozen=True)
class _Logged:
    metrics: list[dict[str, Any]]
    config: LanguageConfig


def _pages() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("spd_fast.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )


def _tokens(run: LanguageRun) -> Text:
    """Token id → text, by the target's own tokenizer where it has one."""
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(run.config.target.path, trust_remote_code=False)
    except (ImportError, OSError, ValueError, KeyError):
        return lambda token: f"[{token}]"

    def text(token: int) -> str:
        piece = tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return f"[{token}]"
        # The marks that BPE and SentencePiece put for a space, and for bytes of a line's end.
        piece = piece.replace("▁", " ").replace("Ġ", " ")
        return {"<0x0A>": "⏎", "Ċ": "⏎"}.get(piece, piece)

    return text


def _context(found: Context, text: Text) -> list[dict[str, Any]]:
    return [
        {
            "text": text(token),
            "g": f"{min(max(g, 0.0), 1.0):.3f}",
            "title": f"importance {g:.3f}",
            "at": i == found.at,
        }
        for i, (token, g) in enumerate(zip(found.tokens, found.importances, strict=True))
    ]


def _matrix(values: Tensor, labels: list[int]) -> Figure:
    fig = figure(300, 300)
    ax = axes_at(fig, 34, 30, 256, 256)
    ax.imshow(np.asarray(values.abs()), cmap=SEQUENTIAL, vmin=0, vmax=1)
    ax.set_xticks(range(len(labels)), [str(c) for c in labels], rotation=90, fontsize=6.5)
    ax.set_yticks(range(len(labels)), [str(c) for c in labels], fontsize=6.5)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return fig


def _heads(values: Tensor, labels: list[int]) -> Figure:
    fig = figure(300, 60 + 14 * len(labels))
    ax = axes_at(fig, 40, 34, 250, 14 * len(labels))
    ax.imshow(np.asarray(values), cmap=SEQUENTIAL, vmin=0, vmax=1, aspect="auto")
    ax.set_yticks(range(len(labels)), [str(c) for c in labels], fontsize=6.5)
    ax.set_xticks(range(values.shape[1]))
    ax.set_xlabel("head")
    return fig


def _described(found: Harvest, text: Text, *, pictures: bool) -> dict[str, Any]:
    components = []
    for i, c in enumerate(found.components):
        components.append(
            {
                "index": c,
                "facts": (
                    f"mean importance {number(found.mean[c].item())} · above 0.01 at "
                    f"{100 * found.frequency[c].item():.1f} % of positions · largest "
                    f"{number(found.peak[c].item())} · ‖v‖‖u‖ {number(found.norm[c].item())}"
                ),
                "tokens": [
                    {"text": text(t), "share": f"{100 * share:.0f} %", "lift": number(lift, 2)}
                    for t, share, lift in found.tokens[i]
                ],
                "contexts": [_context(context, text) for context in found.contexts[i]],
            }
        )
    drawn: list[Picture] = []
    if pictures:
        prefix, chosen = found.site.replace(".", "-"), found.components
        for name, fig, title, caption in (
            (
                "together", _matrix(found.together, chosen), "Important together",
                "Cosine of two components' importances over positions.",
            ),
            (
                "cosines", _matrix(found.cosines, chosen), "Alike as matrices",
                "Absolute cosine of v_i u_iᵀ and v_j u_jᵀ.",
            ),
        ):  # fmt: skip
            drawn.append(Picture(Markup(svg(fig, f"{prefix}-{name}", title)), title, caption))
        if found.heads is not None:
            fig = _heads(found.heads, chosen)
            title = "Where in the heads"
            drawn.append(
                Picture(
                    Markup(svg(fig, f"{prefix}-heads", title)),
                    title,
                    "Share of a component's squared norm in each attention head.",
                )
            )
    alive = int((found.peak > 0.01).sum())
    return {
        "site": found.site,
        "live": f"{alive} of {len(found.mean)} components alive",
        "components": components,
        "pictures": drawn,
    }


def _sparsity(run: LanguageRun, metrics: list[dict[str, Any]]) -> Figure:
    fig = figure(360, 230)
    ax = style(axes_at(fig, 48, 40, 300, 178))
    ax.plot([m["step"] for m in metrics], [sum(m["l0"].values()) for m in metrics], **series(0))
    ax.set_ylabel("L0, all sites")
    ax.set_ylim(bottom=0)
    steps_axis(ax, run.config.steps)
    return fig


def _frontier(points: list[dict[str, float]]) -> Figure:
    fig = figure(360, 250)
    ax = style(axes_at(fig, 48, 60, 300, 178))
    for i, (key, label) in enumerate(
        (("kl_ci", "importances"), ("kl_stochastic", "stochastic"), ("kl_unmasked", "all one"))
    ):
        ax.plot([p["l0"] for p in points], [p[key] for p in points], marker="o", markersize=3.5,
                label=label, **series(i))  # fmt: skip
    middle = sum(ax.get_xlim()) / 2
    for p in (points[0], points[-1]):
        # Inwards of the picture's edges.
        side = "right" if p["l0"] > middle else "left"
        ax.annotate(f"step {p['step']:,.0f}", (p["l0"], p["kl_ci"]), fontsize=7, ha=side,
                    va="top", xytext=(0, -5), textcoords="offset points")  # fmt: skip
    log_axis(ax)
    few_ticks(ax.xaxis, 5)
    ax.set_xlabel("L0, all sites")
    ax.set_ylabel("KL [nats]")
    legend_below(fig, ax, columns=3)
    return fig


def _mask(name: str) -> tuple[str, str]:
    if name == "target":
        return "target", "the model itself"
    if name.startswith("pgd_"):
        count = name.removeprefix("pgd_")
        return f"adversary, {count}", f"r after {count} ascents"
    return MASKS[name]


def _loss_rows(evaluation: dict[str, Any]) -> list[dict[str, str]]:
    ce, kl = evaluation["ce"], evaluation["kl"]
    rows = []
    for name, value in ce.items():
        shown, what = _mask(name)
        over = 100 * (value / ce["target"] - 1)
        rows.append(
            {
                "name": shown,
                "what": what,
                "ce": f"{value:.4f}",
                "over": "—" if name == "target" else f"{over:+.2f} %",
                "kl": "—" if name not in kl else number(kl[name]),
            }
        )
    return rows


def language_table(evaluation: dict[str, Any]) -> str:
    """Next-token loss and KL under each mask, for a terminal."""
    rows = _loss_rows(evaluation)
    width = max(len(r["name"]) for r in rows)
    lines = [f"{'mask'.ljust(width)}  next-token loss  over target  KL [nats]"]
    lines += [f"{r['name'].ljust(width)}  {r['ce']:>15}  {r['over']:>11}  {r['kl']}" for r in rows]
    lines.append(f"L0 {evaluation['l0']:.1f} components per position over all sites")
    return "\n".join(lines)


def language_seeds_table(aggregate: dict[str, Any]) -> str:
    """Next-token loss, KL and L0 over seeds, for a terminal: mean ± sample standard deviation."""

    def shown(stats: dict[str, Any]) -> str:
        std = "" if stats["std"] is None else f" ± {stats['std']:.2g}"
        return f"{stats['mean']:.4g}{std}"

    seeds, diverged = aggregate["seeds"], aggregate["diverged"]
    lines = [f"{aggregate['name']}: {len(seeds) - len(diverged)} of {len(seeds)} seeds finished"]
    names = {mask: _mask(mask)[0] for mask in aggregate["ce"]}
    width = max(map(len, names.values()), default=4)
    lines.append(f"{'mask'.ljust(width)}  {'next-token loss':20}  KL [nats]")
    for mask, ce in aggregate["ce"].items():
        kl = aggregate["kl"].get(mask)
        lines.append(f"{names[mask].ljust(width)}  {shown(ce):20}  {shown(kl) if kl else '—'}")
    if "l0" in aggregate:
        lines.append(f"L0 {shown(aggregate['l0'])} components per position over all sites")
    return "\n".join(lines)


def _context_of_page(title: str, lead: str) -> dict[str, Any]:
    return {
        "title": title, "lead": lead, "palette": LIGHT_AND_DARK, "facts": [], "losses": [],
        "pictures": [], "groups": [], "sites": [], "yaml": "", "environment": [], "positions": "",
    }  # fmt: skip


def write_language_report(run: LanguageRun) -> Path:
    """Write figures/*.png and report.html into the run's folder.

    Raises:
        UserError: the run has no eval.json.
    """
    evaluation, config, metrics = run.evaluation(), run.config, run.metrics()
    text = _tokens(run)
    held = run.folder / "env.json"
    environment = json.loads(held.read_text(encoding="utf-8")) if held.exists() else {}
    album = Album(run.folder / "figures")
    album.folder.mkdir(parents=True, exist_ok=True)
    page = _context_of_page(
        f"{config.name} · seed {config.seed}",
        f"{config.target.path}: {len(run.model.sites)} matrices decomposed, {config.steps:,} steps "
        f"of {config.batch_size} sequences.",
    )
    with drawing():
        page["pictures"] = [
            album.add("losses", curves.losses(_Logged(metrics, config)), "Losses",
                      "Single batches, before their coefficients; the total is weighted."),
            album.add("sparsity", _sparsity(run, metrics), "Important components per position",
                      "Importance above 0.01, summed over sites. Good: falls as the losses fall."),
        ]  # fmt: skip
        if evaluation["frontier"]:
            page["pictures"].append(
                album.add("frontier", _frontier(evaluation["frontier"]), "KL against L0",
                          "A point a checkpoint. Good: towards the lower left.")
            )  # fmt: skip
        page["harvests"] = [
            _described(
                harvest(run.model, name, run.evaluation_batches, top=REPORTED, contexts=4),
                text,
                pictures=False,
            )
            for name in run.model.sites
        ]
    ce = evaluation["ce"]
    page["facts"] = [
        ("unmasked loss over the target's", f"{100 * (ce['unmasked'] / ce['target'] - 1):+.2f} %"),
        ("KL, importances", number(evaluation["kl"]["ci"])),
        ("KL, stochastic", number(evaluation["kl"]["stochastic"])),
        ("L0, all sites", number(evaluation["l0"])),
        ("training", duration(evaluation["seconds"])),
        ("per step", f"{number(evaluation['ms_per_step'])} ms"),
    ]
    page["losses"] = _loss_rows(evaluation)
    page["positions"] = f"{evaluation['positions']:,}"
    page["groups"] = [
        [
            group, g["sites"], g["components"],
            *(g["live_components"][t] for t in ("0.01", "0.1", "0.5")), number(g["l0"]),
        ]
        for group, g in evaluation["groups"].items()
    ]  # fmt: skip
    page["sites"] = [
        [
            name, s["components"], s["live_components"]["0.1"], number(s["l0"]),
            number(s["relative_error"]), number(s["hidden_error"]),
        ]
        for name, s in evaluation["sites"].items()
    ]  # fmt: skip
    page["yaml"] = config.to_yaml()
    page["environment"] = [(k, str(v)) for k, v in environment.items()]
    return _write(run.folder / "report.html", page)


def write_components(
    run: LanguageRun, sites: list[str], *, top: int, contexts: int, out: Path | None = None
) -> Path:
    """Write components.html: the top components of each site, with their contexts.

    Raises:
        UserError: an unknown site.
    """
    text = _tokens(run)
    page = _context_of_page(
        f"Components of {run.config.name} · seed {run.config.seed}",
        f"{run.config.target.path}: the {top} most important components of {len(sites)} "
        f"{'matrix' if len(sites) == 1 else 'matrices'}.",
    )
    with drawing():
        page["harvests"] = [
            _described(
                harvest(run.model, name, run.evaluation_batches, top=top, contexts=contexts),
                text,
                pictures=True,
            )
            for name in sites
        ]
    return _write(out or run.folder / "components.html", page)


def _write(path: Path, page: dict[str, Any]) -> Path:
    html = _pages().get_template("language.html.j2").render(page)
    write_bytes(path, html.encode())
    return path
