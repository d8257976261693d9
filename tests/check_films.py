"""Form and genres of a finished run's texts on films, "title (year): genre, genre" (not collected by pytest):

    python tests/check_films.py RUN [--pairs 1000]

Of the texts made for the prompts and users of the run's test part: how many have the form, how many name exactly the
genres of the prompt, how many are word for word in the training part; and a few of them."""
import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import train  # noqa: E402
from dppmg import parse_prompt  # noqa: E402
from tests.report import load  # noqa: E402

FORM = re.compile(r".+ \(\d{4}\): (.+)")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--pairs", type=int, default=1000)
    args = parser.parse_args()
    try:
        run = load(args.run)
    except ValueError as error:
        parser.error(str(error))
    if run.world:
        parser.error(f"{args.run} is a run on stickers; need one on films")
    pairs = train.draw_pairs(run, train.TEST, args.pairs)
    known = {run.data.texts[i] for i in run.seen.tolist()}
    for variant in train.VARIANTS:
        made = train.make(run, variant, pairs, run.generator("films"))
        texts, items = run.model.tokenizer.decode_batch(made.own.tokens), made.pairs.item.tolist()
        found = [FORM.fullmatch(text) for text in texts]
        right = [match is not None and set(parse_prompt(match[1])) == set(run.data.prompts[i]) for match, i in zip(found, items)]
        copied = [text in known for text in texts]
        print(f"{variant}: {len(texts)} texts, form {sum(map(bool, found)) / len(texts):.3f}, genres as asked "
              f"{sum(right) / len(texts):.3f}, copied {sum(copied) / len(texts):.3f}")
        print(*(f"    {text}" for text in texts[:8]), sep="\n")


if __name__ == "__main__":
    main()
