"""The committed results, and the tables of README.md and RESULTS.md that are made of them.

    python tests/results.py stickers RUN...    take these finished runs for a data set's results
    python tests/results.py claims STUDY       take the folder that study.py wrote its claims into
    python tests/results.py                    write the tables anew

tests/results.json holds metrics.json and the machine of each run. In the documents a table stands
between <!-- TABLE DATASET --> and <!-- end -->, TABLE being one of TABLES; tests/test_results.py
holds the documents against the file."""
import json
import re
import sys
import textwrap
from pathlib import Path

HERE = Path(__file__).parent
FILE = HERE / "results.json"
DOCUMENTS = (HERE.parent / "README.md", HERE / "RESULTS.md")
SHORT = "consistency consistency_repaired utility taste variety judge_consistency judge_swap".split()
STUDIED = "consistency consistency_repaired utility taste variety swap nearness prompt".split()
JUDGED = "consistency consistency_repaired swap variety prompt".split()  # where tastes are not known


def rounded(value):
    """The same values, numbers to four digits."""
    if isinstance(value, dict):
        return {name: rounded(x) for name, x in value.items()}
    if isinstance(value, list):
        return [rounded(x) for x in value]
    return round(value, 4) if isinstance(value, float) else value


def read_run(folder: Path) -> dict:
    """What a finished run or study measured, and on which machine."""
    if (folder / "study.json").exists():
        study = json.loads((folder / "study.json").read_text())
        keep = "row people training_seconds pair_seconds measures".split()
        study["rows"] = [{name: row[name] for name in keep} for row in study["rows"]]
        exact = any("utility" in row["measures"] for row in study["rows"])
        names = STUDIED if exact else [*(f"judge_{name}" for name in JUDGED), "nearness"]
        for row in study["rows"]:
            row["measures"] = {name: row["measures"].get(name) for name in names}
        return rounded({name: study[name] for name in ("machine", "seeds", "rows", "claims")})
    machine = json.loads((folder / "config.json").read_text())["machine"]
    return {"machine": machine} | rounded(json.loads((folder / "metrics.json").read_text()))


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


def across(values: list[float], digits: int = 3) -> str:
    """The mean of several runs, with the lowest and the highest where they differ."""
    shown = [f"{x:.{digits}f}" for x in (sum(values) / len(values), min(values), max(values))]
    return shown[0] if shown[1] == shown[2] else f"{shown[0]} ({shown[1]}–{shown[2]})"


def measured(runs: list[dict], variant: str, name: str, digits: int) -> str:
    """A measure of a variant: of several runs `across` them, of one run with its interval."""
    found = [run["generation"][variant].get(name, {"mean": None}) for run in runs]
    if None in (x["mean"] for x in found):
        return ""
    if len(runs) > 1:
        return across([x["mean"] for x in found], digits)
    if digits == 2:
        return "{mean:.2f} ±{half:.2f}".format(half=(found[0]["high"] - found[0]["low"]) / 2, **found[0])
    return "{mean:.{d}f} [{low:.{d}f}, {high:.{d}f}]".format(d=digits, **found[0])


def generation(runs: list[dict], names: list[str], digits: int = 3) -> str:
    """Measures down, variants across."""
    variants = list(runs[0]["generation"])
    rows = [[name, *(measured(runs, v, name, digits) for v in variants)] for name in names]
    return markdown(["", *(v.replace("_", " ") for v in variants)], rows)


def short(runs: list[dict]) -> str:
    """The measures and variants that the README shows, to two digits."""
    there = runs[0]["generation"]["after_reward"]
    names = [name + end for name in SHORT for end in ("", "_image", "_text") if name + end in there]
    if "consistency" in there:  # what a referee sees exactly needs no judge
        names = [name for name in names if "judge" not in name]
    return generation([run | {"generation": {v: x for v, x in run["generation"].items()
                                             if v != "unpersonalized"}} for run in runs], names, 2)


def full(runs: list[dict]) -> str:
    """Every measure."""
    return generation(runs, list(runs[0]["generation"]["after_reward"]))


def differences(runs: list[dict]) -> str:
    """after_reward less before_reward, paired by user, with 95 % intervals, a run a column."""
    shown = "{mean:+.3f} [{low:+.3f}, {high:+.3f}]".format
    rows = [[name, *(shown(**run["differences"][name]) for run in runs)]
            for name, found in runs[0]["differences"].items() if found["mean"] is not None]
    return markdown(["after less before", *(f"seed {run['seed']}" for run in runs)], rows)


def new_users(runs: list[dict]) -> str:
    """People folded in from so much of their history, beside those in training."""
    def value(x):
        return x["mean"] if isinstance(x, dict) else x
    found = [run["new_users"] for run in runs]
    names = [name for name in found[0]["in training"] if not re.match("ndcg|recall@20_", name)]
    rows = [[k, *(across([value(x[k][name]) for x in found]) for name in names)] for k in found[0]]
    return markdown(["history", *names], rows)


def stage1(runs: list[dict]) -> str:
    """Ranking and codes."""
    rows = [[name, across([run["stage1"][name] for run in runs])] for name in runs[0]["stage1"]]
    for m, health in runs[0]["codebook"].items():
        for name, found in health.items():
            values = [run["codebook"][m][name] for run in runs]
            if isinstance(found, list):
                values = [sum(x) / len(x) for x in values]
            rows.append([f"{name} of codes, {m}", across(values)])
    return markdown(["", "test part; codes over all users"], rows)


def seconds(runs: list[dict]) -> str:
    """CPU seconds by stage, and memory."""
    rows = [[stage, *(f"{run['cpu_seconds'].get(stage, 0):.0f}" for run in runs)]
            for stage in runs[0]["cpu_seconds"]]
    rows.append(["memory, MB", *(str(run["peak_memory_mb"]) for run in runs)])
    head = [f"seed {run['seed']}: {run['device']}, {run['threads']} thread(s), torch "
            f"{run['machine']['torch']}" for run in runs]
    return markdown(["CPU seconds", *head], rows)


def words(runs: list[dict]) -> str:
    """What the reward gains and what it costs, in two paragraphs."""
    def mean(variant, name):
        return sum(run["generation"][variant][name]["mean"] for run in runs) / len(runs)

    def kept(variant, m):
        return mean(variant, f"taste_{m}") / mean("before_reward", f"taste_{m}")

    def new(who, name):
        found = [run["new_users"][who][name] for run in runs]
        return sum(x["mean"] if isinstance(x, dict) else x for x in found) / len(runs)
    bits = sum(x["stage1"]["recall@20_quantized"] / x["stage1"]["recall@20"] for x in runs)
    gain = f"""**What the reward gains, and what it costs.** Picture and text agree in
        {mean('after_reward', 'consistency'):.2f} of the pairs instead of
        {mean('before_reward', 'consistency'):.2f}. They are drawn independently, given prompt and
        tokens, so they can agree at most as often as sqrt((1 - variety_image)(1 - variety_text)) of
        the setting alone allows: {mean('after_reward', 'consistency_bound'):.2f}. With the text
        of another draw they agree in
        {mean('after_reward', 'consistency_repaired'):.2f}. So the gain is bought with variety:
        taste falls to {kept('after_reward', 'image'):.0%} (pictures) and
        {kept('after_reward', 'text'):.0%} (texts) of what it was. **The rival that needs no
        training**, the best pair of 4 pictures and 8 texts by the same reward (`best of`), agrees
        in {mean('best_of', 'consistency'):.2f} and keeps
        {kept('best_of', 'image'):.0%} and {kept('best_of', 'text'):.0%} of the tastes, at four
        times the pictures and eight times the texts."""
    people = f"""**New people**, who were in no training, folded in from their whole history, reach
        recall@20 {new('whole history', 'recall@20'):.3f} (those in training
        {new('in training', 'recall@20'):.3f}); after the reward their pictures and texts agree in
        {new('whole history', 'consistency'):.2f} (in training: {new('in training', 'consistency'):.2f},
        on as many pairs): whether the reward helps new people, nobody can tell (claim d). Ranking
        from the tokens alone, 24 bits a user and modality, keeps {bits / len(runs):.0%} of recall@20."""
    return "\n\n".join(textwrap.fill(" ".join(part.split()), 118, break_on_hyphens=False)
                       for part in (gain, people))


def near(found: dict | None) -> str:
    """An interval by its mean and half its width."""
    return found and f"{found['mean']:.3f} ± {(found['high'] - found['low']) / 2:.3f}" or ""


def rivals(studies: list[dict]) -> str:
    """The rows of a study, people in training above those folded in."""
    names = list(studies[0]["rows"][0]["measures"])
    rows = [[row["row"], row["people"], *(near(row["measures"][name]) for name in names),
             f"{row['training_seconds'] or 0:.0f}", f"{row['pair_seconds'] or 0:.3f}"]
            for people in ("training", "new") for row in studies[0]["rows"] if row["people"] == people]
    return markdown(["row", "people", *names, "training s", "s a pair"], rows)


def verdicts(studies: list[dict]) -> str:
    """The claims of the paper, one difference a line."""
    rows = [[x["claim"], x["people"], x["measure"], near(x), x["verdict"]] for x in studies[0]["claims"]]
    return markdown(["claim", "people", "measure", "difference", ""], rows)


BRIEF = {"a": "graph beats average of history", "b": "modal-specific beats shared",
         "c": "discrete keeps what continuous has", "d": "the reward raises", "e": "while it keeps",
         "f": "beats best of n (dearer)"}


def brief(studies: list[dict]) -> str:
    """The claims on their first measures, people in training beside new ones."""
    told = {}
    for x in studies[0]["claims"]:
        brief = x["measure"] == "consistency" and "equal" not in x["claim"]
        if x["measure"] != "variety" and (x["claim"][1] != "f" or brief):
            found = told.setdefault(f"({x['claim'][1]}) {BRIEF[x['claim'][1]]}: {x['measure']}", {})
            found[x["people"]] = f"{x['mean']:+.3f} {x['verdict']}"
    rows = [[claim, found["training"], found["new"]] for claim, found in told.items()]
    return markdown(["claim", "in training", "new (10 likes)"], rows)


TABLES = {f.__name__: f for f in (short, full, differences, new_users, stage1, seconds, words, rivals,
                                  verdicts, brief)}


def written(text: str, results: dict) -> str:
    """A document with its tables written anew. Raises KeyError on one that is not known."""
    def table(match):
        name, dataset = match[1].split()
        return f"<!-- {name} {dataset} -->\n{TABLES[name](results[dataset])}\n<!-- end -->"
    return re.sub(r"<!-- (\w+ \w+) -->\n.*?<!-- end -->", table, text, flags=re.S)


def main(argv: list[str]):
    """Take in runs, if any, and write the tables."""
    results = json.loads(FILE.read_text()) if FILE.exists() else {}
    if argv:
        results[argv[0]] = [read_run(Path(folder)) for folder in argv[1:]]
        FILE.write_text(json.dumps(results))
    for path in DOCUMENTS:
        path.write_text(written(path.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
