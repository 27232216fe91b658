#!/usr/bin/env python
"""Publishes a model, or tokens as a dataset, on the Hub: in one commit, with a card.

python scripts/push_to_hub.py --model runs/mine/best --repo-id USER/NAME
python scripts/push_to_hub.py --tokens runs/demo/tokens --repo-id USER/NAME --license cc-by-4.0

Who you are is known by the environment variable HF_TOKEN, or by `hf auth login`.

A README.md in the folder that you wrote goes along as it is. Otherwise the card is filled: for tokens from
manifest.json; for a model from metrics.json (scripts/evaluate.py writes it), config.yaml (training/train.py writes it)
and data.yaml (you write it), each in the model's folder or beside it. What is missing is asked for. data.yaml:

license: mit                      # of the weights, as the Hub names it
training_data:
  - name: my recordings           # more keys: url, sequences, frames
    description: 12 signers of Portuguese Sign Language, weather reports
    license: CC BY 4.0
evaluation:
  - name: unseen signers          # more keys: description, split,
    metrics: unseen/metrics.json  # and the file of the figures, if it is not metrics.json
limits: >-
  Who and what is hardly in the data; where the model should not be used.
training: run/config.yaml         # if it is not config.yaml
"""

from modeling_pose_tokenizer.commands import run_command  # before all else: it answers Ctrl-C

# isort: split
import argparse
from pathlib import Path

from modeling_pose_tokenizer.cards import CardError, is_filled, make_model_card
from modeling_pose_tokenizer.extraction import TokenFolderError
from modeling_pose_tokenizer.hub import ModelFolderError, load_pretrained
from modeling_pose_tokenizer.publishing import PublishError, push_model, push_tokens
from modeling_pose_tokenizer.sequences import replacing

ROOT = Path(__file__).parents[1]
FOR_MODELS, FOR_TOKENS = ("data_card", "card", "plain_card"), ("license", "made_by")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="DIR", help="checkpoint folder, such as best/ of a training run")
    what.add_argument("--tokens", metavar="DIR", help="folder that extract_tokens.py wrote, all its splits complete")
    parser.add_argument("--repo-id", required=True, metavar="USER/NAME", help="the repository; made if there is none")
    parser.add_argument("--private", action="store_true", help="nobody else can see the repository")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to upload to (default: main)")
    model = parser.add_argument_group("with --model")
    model.add_argument("--data-card", metavar="FILE", help="the data.yaml (default: in DIR or beside it)")
    model.add_argument("--card", metavar="FILE", help="write the filled card there and publish nothing")
    model.add_argument(
        "--plain-card", action="store_true", help="no figures: the repository's own card stays, or the sizes are all"
    )
    tokens = parser.add_argument_group("with --tokens")
    tokens.add_argument("--license", metavar="NAME", help="as the Hub names it, such as cc-by-4.0")
    tokens.add_argument(
        "--made-by", metavar="USER/MODEL", help="the model's repository (default: as manifest.json says)"
    )
    args = parser.parse_args()
    for name in FOR_MODELS if args.model is None else FOR_TOKENS:
        if getattr(args, name):
            parser.error(f"--{name.replace('_', '-')} goes with {'--model' if args.model is None else '--tokens'}.")
    print(publish_model(args) if args.model is not None else publish_tokens(args))


def publish_model(args: argparse.Namespace) -> str:
    """Address of the commit, or the path of the card."""
    load_pretrained(Path(args.model).absolute())  # before its files are read for the card
    own = Path(args.model, "README.md").exists() and not is_filled(Path(args.model, "README.md"))
    text = None
    if args.card or not (own or args.plain_card):
        templates = ROOT / "model_card.md", ROOT / "CITATION.cff"
        options = {"description": args.data_card, "revision": args.revision}
        text = make_model_card(args.model, args.repo_id, *templates, **options)
    if args.card is None:
        return push_model(args.model, args.repo_id, card=text, private=args.private, revision=args.revision)
    try:
        with replacing(Path(args.card)) as temporary:
            temporary.write_text(str(text), encoding="utf-8")
    except OSError as error:
        raise CardError(f"{args.card}: cannot be written ({error.strerror or error}).") from error
    return str(args.card)


def publish_tokens(args: argparse.Namespace) -> str:
    """Address of the commit."""
    return push_tokens(
        args.tokens,
        args.repo_id,
        ROOT / "dataset_card.md",
        license=args.license,
        model=args.made_by,
        private=args.private,
        revision=args.revision,
    )


if __name__ == "__main__":
    stopped = "the repository has all of the commit or nothing of it; the same command commits again."
    run_command(main, stopped, CardError, ModelFolderError, TokenFolderError, PublishError)
