"""Turn text into token files: the data step of training, alone.

    python -m jgpt.prepare --config configs/quickstart.py --config.data.text_glob='texts/**/*.txt'

Training does the same when the token directory is missing or out of date. A large text is prepared by several processes
at once, on one machine or on several with a shared data.cache_dir. Each gets one of these, in any order:

    python -m jgpt.prepare --config ... --config.data.cache_dir=DIR --shard=0/4    and 1/4, 2/4, 3/4
"""

from absl import flags

from jgpt.cli.flags import define_config, load_config
from jgpt.cli.run import run
from jgpt.config.check import check
from jgpt.config.files import user_path

PREVIEW_TOKENS = 200


def define_flags() -> None:
    """Define the flags."""
    define_config()
    flags.DEFINE_string(
        "shard", "", "prepare one part of the text: INDEX/NUMBER, from 0/NUMBER; the last part to end joins all"
    )


def main() -> None:
    """Prepare the token directory that the config names, and say what is in it."""
    # Here, as all that loads JAX: --help must not wait for it.
    from jgpt.cli.terminal import write
    from jgpt.data.parts import parse_part
    from jgpt.data.token_directory import token_directory
    from jgpt.data.write_tokens import prepare, prepare_part
    from jgpt.loading.adopt import adopt_source

    part = parse_part(flags.FLAGS.shard) if flags.FLAGS["shard"].present else None
    config = load_config()
    check(config)
    config, _ = adopt_source(config, user_path(config.out_dir).absolute())
    data = prepare_part(config, part) if part else prepare(config)
    print(f"token directory   {token_directory(config)}")
    if data is None:
        print(f"shard             {part} is complete, others are not yet")
        return
    meta = data.meta
    n_tokens, n_bytes = len(data.train) + len(data.val), meta["train_bytes"] + meta["val_bytes"]
    if data.is_chat:
        n_targets = meta["train_targets"] + meta["val_targets"]
        print(f"conversations     {meta['n_documents']:,} ({n_bytes / 1e6:.1f} MB of answers)")
        print(f"learned           {n_targets:,} tokens, {n_targets / n_tokens:.0%} of all")
    else:
        print(f"documents         {meta['n_documents']:,} ({n_bytes / 1e6:.1f} MB of text)")
        print(f"bytes per token   {n_bytes / n_tokens:.2f}")
    print(f"tokens            {len(data.train):,} train, {len(data.val):,} validation (split by {meta['split']})")
    print(f"vocabulary        {data.tokenizer.vocab_size:,} ids ({meta['tokenizer_kind']}), stored as {meta['dtype']}")
    print("begins with")
    for line in data.tokenizer.decode(data.ids(data.train[:PREVIEW_TOKENS])).splitlines()[:3]:
        write(f"    {line[:100]}\n")


if __name__ == "__main__":
    define_flags()
    run(main, __doc__)
