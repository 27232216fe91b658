#!/usr/bin/env python
"""A page to try the pose tokenizer in: a recording and what its tokens keep of it play side by side.

python space/app.py [--model DIR_OR_ID]

Without --model it takes the model that the environment variable POSE_TOKENIZER_MODEL names, or pretrained/small.
README.md beside this file says how to publish the page as a Hugging Face Space.
"""

import argparse
import html
import math
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch

from modeling_pose_tokenizer.codes_pose_tokenizer import PoseCodeFormatter
from modeling_pose_tokenizer.conversion import find_input
from modeling_pose_tokenizer.formats import PoseDataError, PoseFileError, PoseSequence, read_npz, read_pose, write_npz
from modeling_pose_tokenizer.hub import ModelFolderError, load_pretrained
from modeling_pose_tokenizer.metrics import ReconstructionMetrics
from modeling_pose_tokenizer.report import PosePair, TokenStrip, render_player

HERE = Path(__file__).resolve().parent
DEFAULT_MODEL = "pretrained/small"
MAX_FRAMES = 3600  # a minute at 60 frames per second
MAX_BYTES = 64 * 2**20  # a minute of Holistic's 543 keypoints is half of it
KEPT_SECONDS = 3600  # of files; Gradio forgets a visitor as long after the last tab was closed
MAX_VISITORS = 500  # whoever came least recently is forgotten
LEXICON = "spoken_to_signed:assets/fingerspelling_lexicon"
# Of three languages that `make demo` tests on, the letter that was the median by hand error when they were chosen.
EXAMPLES = {
    "American Sign Language, X": "ase/fs-sts2ed18da646d87198c9cd5c06872bfa15.pose",
    "Portuguese Sign Language, I": "psr/fs-stscad93669c7e5970c1005727b3672c7bd.pose",
    "Turkish Sign Language, Z": "tsm/fs-sts4c53e38bd56ddc678854c70c04ddc879.pose",
}
# The visitor's own fonts: nothing to fetch.
FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
MONOSPACE = ["ui-monospace", "Menlo", "Consolas", "monospace"]

# The player is a page of its own in a frame, as high as its content and of the theme around it. The next one takes
# over where the one before stands, and replaces it once it is drawn.
FRAME = """
const dress = (frame) => {
  const theme = document.body.classList.contains('dark') ? 'dark' : 'light';
  frame.style.colorScheme = theme;  // as inside, or the frame is not transparent
  frame.contentWindow.setTheme?.(theme);
};
const show = () => {
  const page = props.value?.page, stage = element.querySelector('.stage');
  if (!page) return;
  const before = stage.querySelector('iframe'), next = document.createElement('iframe');
  next.title = 'Player';
  next.srcdoc = page;
  next.style.cssText = 'width:100%;border:0;display:block;position:absolute;visibility:hidden';
  stage.append(next);
  next.addEventListener('load', () => {
    if (!next.isConnected) return;
    const inside = next.contentDocument, part = (name) => inside.querySelector(name);
    dress(next);
    if (before?.contentDocument && props.value.continues) {
      for (const name of ['.view', '.speed', '.controls input']) {
        part(name).value = before.contentDocument.querySelector(name).value;
        part(name).dispatchEvent(new Event(name === '.controls input' ? 'input' : 'change'));
      }
      if (before.contentDocument.querySelector('[aria-label=Pause]')) part('.play').click();
    }
    const fit = () => (next.style.height = Math.ceil(inside.body.getBoundingClientRect().height) + 8 + 'px');
    new next.contentWindow.ResizeObserver(fit).observe(inside.body);
    fit();
    next.style.position = next.style.visibility = '';
    for (const other of stage.querySelectorAll('iframe')) if (other !== next) other.remove();
  });
};
watch('value', show);
const dressAll = () => element.querySelectorAll('iframe').forEach(dress);
new MutationObserver(dressAll).observe(document.body, { attributeFilter: ['class'] });
show();
"""
CSS = """
.gradio-container { max-width: 1120px !important; margin: 0 auto !important; }
.gradio-container .html-container { padding: 0 !important; }
.stage { position: relative; }
.figures { display: grid; grid-template-columns: repeat(4, 1fr); gap: 14px 20px; margin: 4px 0 12px; }
@media (max-width: 640px) { .figures { grid-template-columns: repeat(2, 1fr); } }
.figures div { border-top: 1px solid var(--border-color-primary); padding-top: 8px; }
.figures dt { font-size: 13px; color: var(--body-text-color-subdued); }
.figures dd { margin: 0; font-size: 21px; font-weight: 600; font-variant-numeric: tabular-nums; }
.note, .note p { font-size: 13px; color: var(--body-text-color-subdued); }
.refusal { border: 1px solid #c0392b; border-left-width: 4px; border-radius: 6px; padding: 12px 16px;
  background: var(--error-background-fill, transparent); overflow-wrap: anywhere; }
"""


@dataclass
class Clip:
    """What one visitor looks at: read, normalised and encoded once, then decoded for every position of the slider.

    Attributes:
        name: the file's, without its ending.
        sequence: (T, N, D) in the file's units; a masked frame shows nothing.
        fps: its frames per second; the model's where the file does not say.
        inputs: what the feature extractor made of it.
        codes: (1, Q, S) of all levels.
        encode_seconds: what normalising and encoding took.
        note: what the visitor should know of the file, or "".
        folder: for the files to download; it goes with the clip.
    """

    name: str
    sequence: PoseSequence
    fps: float
    inputs: Any
    codes: torch.Tensor
    encode_seconds: float
    note: str = ""
    folder: tempfile.TemporaryDirectory = field(
        default_factory=lambda: tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    )


@dataclass
class View:
    """A clip at one position of the slider.

    Attributes:
        page: the player.
        figures: rate and errors, as HTML.
        tokens: a text file, one line as `PoseCodeFormatter` writes it.
        reconstruction: an npz file in the coordinates of the input.
    """

    page: str
    figures: str
    tokens: str
    reconstruction: str


class Codec:
    """A model behind the page. It keeps nothing of any visitor.

    Args:
        name: checkpoint folder or repository on the Hub.

    Raises:
        ModelFolderError: there is no pose tokenizer of that name.
    """

    def __init__(self, name: str) -> None:
        model, self.feature_extractor = load_pretrained(name)
        self.model, self.config = model.float(), model.config
        self.formatter = PoseCodeFormatter.from_config(self.config)

    @property
    def accepts(self) -> str:
        """What files the page takes."""
        shape = f"(frames, {self.config.num_keypoints}, {self.config.keypoint_dim})"
        layout = f"in the layout {self.config.skeleton}" if self.config.skeleton else "in the model's own layout"
        limits = f"up to {MAX_FRAMES} frames and {MAX_BYTES // 2**20} MB"
        return f".npz with poses {shape} {layout}, or .pose of MediaPipe Holistic; {limits}"

    def read(self, path: str) -> tuple[PoseSequence, str]:
        """The sequence of a file, the first of a shard, and a note on what of the file is not shown.

        Raises:
            PoseFileError: The file is broken, of another layout, or too long.
        """
        size = os.path.getsize(path)
        if size == 0:
            raise PoseFileError(path, "is empty (0 bytes)")
        if size > MAX_BYTES:
            raise PoseFileError(path, f"has {size / 2**20:.0f} MB, expected at most {MAX_BYTES // 2**20} MB")
        if Path(path).suffix.lower() == ".pose":
            try:
                sequences = [read_pose(path, self.config.skeleton or "", self.config.keypoint_dim)]
            except PoseFileError:
                raise
            except ValueError as error:  # a model of a layout that Holistic does not convert to
                raise PoseFileError(path, str(error)) from None
        else:
            expected = {"num_keypoints": self.config.num_keypoints, "keypoint_dim": self.config.keypoint_dim}
            sequences = read_npz(path, **expected, max_bytes=MAX_BYTES)
        sequence = sequences[0]
        try:
            frames = self.feature_extractor.resampled_length(len(sequence.poses), sequence.fps)
        except ValueError as error:  # its frame rate would make far too many
            raise PoseFileError(path, str(error)) from None
        if max(frames, len(sequence.poses)) > MAX_FRAMES:
            rate = f", which are {frames} at the model's frame rate" if frames != len(sequence.poses) else ""
            raise PoseFileError(
                path, f"has {len(sequence.poses)} frames{rate}, expected at most {MAX_FRAMES}: cut it into pieces"
            )
        poses = np.where(sequence.mask[:, None, None], sequence.poses, np.float32(0))
        note = f"The file holds {len(sequences)} sequences; this is the first." if len(sequences) > 1 else ""
        return PoseSequence(sequence.id, poses, sequence.mask, sequence.fps), note

    @torch.inference_mode()
    def open(self, path: str) -> Clip:
        """Reads a file, and encodes it with all levels, of which every position of the slider decodes the first.

        Raises:
            PoseFileError: The file cannot be used.
        """
        sequence, note = self.read(path)
        start = time.perf_counter()
        inputs = self.feature_extractor(sequence.poses, fps=sequence.fps, return_tensors="pt")
        codes = self.model.encode(inputs["input_values"], inputs["padding_mask"]).pose_codes
        fps = sequence.fps or float(self.config.sampling_rate)
        return Clip(Path(path).stem, sequence, fps, inputs, codes, time.perf_counter() - start, note)

    @torch.inference_mode()
    def view(self, clip: Clip, levels: int) -> View:
        """Decodes the first levels of a clip, measures what came back, and writes the files to download."""
        values, mask = clip.inputs["input_values"], clip.inputs["padding_mask"]
        sequence, config = clip.sequence, self.config
        start = time.perf_counter()
        decoded = self.model.decode(clip.codes, mask, num_quantizers=levels).pose_values
        reconstruction = self.feature_extractor.postprocess(decoded, clip.inputs)[0]
        seconds = clip.encode_seconds, time.perf_counter() - start
        codes = clip.codes[0, : self.model.quantizer.count_codebooks(levels)]  # (Q, S)
        metrics = ReconstructionMetrics(config.layout, config)
        metrics.update(decoded, values, mask)
        strip = TokenStrip(
            codes.numpy(),
            config.codebook_index[: len(codes)],
            config.codebook_size,
            config.hop_length * clip.fps / config.sampling_rate,
        )
        pair = PosePair(sequence.id, sequence.poses, reconstruction, clip.fps, tokens=strip)
        stem = Path(clip.folder.name, clip.name)  # an id of a shard could be anything
        tokens, poses = f"{stem}.level{levels}.txt", f"{stem}.level{levels}.npz"
        Path(tokens).write_text(self.formatter.codes_to_text(codes) + "\n", encoding="utf-8")
        write_npz(poses, PoseSequence(sequence.id, reconstruction, sequence.mask, clip.fps))
        page = render_player(pair, config.layout, config.confidence_threshold)
        return View(page, self._figures(clip, len(codes), metrics, seconds), tokens, poses)

    def _figures(
        self, clip: Clip, codebooks: int, metrics: ReconstructionMetrics, seconds: tuple[float, float]
    ) -> str:
        """Rate and errors as HTML; every `data` element has the full value."""
        config = self.config
        bits = codebooks * math.log2(config.codebook_size) / config.hop_length  # per frame
        duration = len(clip.sequence.poses) / clip.fps
        coordinates = config.layout.num_keypoints * (config.keypoint_dim - 1)
        rows: list[tuple[str, float | None, str]] = [
            ("Bits per second", bits * config.sampling_rate, "{:,.0f}"),
            ("Tokens per second", codebooks * config.frame_rate, "{:,.1f}"),
            ("Smaller than float32", 32 * coordinates / bits, "{:,.0f}\u2009×"),
            ("Error", metrics.summary()["mpjpe"], "percent"),
            *(
                (f"{part.replace('_', ' ').capitalize()} error", metrics.summary(own)["mpjpe"], "percent")
                for part, own in config.layout.group_keypoints.items()
            ),
        ]
        cells = []
        for name, value, style in rows:
            text = "–" if value is None else f"{100 * value:.2f}\u2009%" if style == "percent" else style.format(value)
            shown = text if value is None else f'<data value="{value}">{text}</data>'
            cells.append(f"<div><dt>{name}</dt><dd>{shown}</dd></div>")
        note = (
            f"{clip.note} Errors are mean distances in percent of the signer’s shoulder width. Encoded in "
            f"{1000 * seconds[0]:.0f} ms and decoded in {1000 * seconds[1]:.0f} ms; the clip lasts {duration:.1f} s."
        )
        return f'<dl class="figures">{"".join(cells)}</dl><p class="note">{html.escape(note.strip())}</p>'


def copy_examples(folder: str) -> dict[str, str]:
    """Label -> a copy, by a name that says something, of what comes with the package spoken-to-signed.

    There is none where the package is not installed, and the page does without.
    """
    try:
        sources = {label: find_input(f"{LEXICON}/{name}") for label, name in EXAMPLES.items()}
    except PoseDataError:
        return {}
    names = {label: f"{label.split()[0].lower()}-{label[-1].lower()}.pose" for label in sources}
    return {label: str(shutil.copy(source, Path(folder, names[label]))) for label, source in sources.items()}


def open_file(codec: Codec, path: str | None, levels: int) -> tuple[Any, ...]:
    """A new file, or none: the visitor's clip, the refusal, the results, and what `show` returns."""
    nothing = (None, gr.skip(), gr.skip(), gr.skip())
    if path is None:
        return (None, gr.update(visible=False), gr.update(visible=False), *nothing)
    try:
        clip = codec.open(path)
    except PoseFileError as error:
        # The reason may quote the file, which is anybody's; the path is this machine's.
        message = html.escape(f"{Path(path).name}: {error.reason}. Expected: {codec.accepts}.")
        refusal = gr.update(value=f'<div class="refusal" role="alert">{message}</div>', visible=True)
        return (None, refusal, gr.update(visible=False), *nothing)
    return (clip, gr.update(visible=False), gr.update(visible=True), *show(codec, clip, levels, continues=False))


def move_slider(codec: Codec, clip: Clip | None, levels: int) -> tuple[Any, ...]:
    """Another quality: what `show` returns."""
    return (gr.skip(),) * 4 if clip is None else show(codec, clip, levels, continues=True)


def show(codec: Codec, clip: Clip, levels: int, continues: bool) -> tuple[Any, ...]:
    """The player, the figures and the two files to download; a player that `continues` takes over from the last."""
    view = codec.view(clip, int(levels))
    return {"page": view.page, "continues": continues}, view.figures, view.tokens, view.reconstruction


def make_page(codec: Codec) -> gr.Blocks:
    """The page: what a visitor does changes nothing but that visitor's own state."""
    levels = codec.config.num_levels
    with gr.Blocks(title="Pose Tokenizer", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as page:
        gr.Markdown(
            "# Pose Tokenizer\n"
            "A neural codec for signing: keypoints go in, a few discrete tokens per second come out, and the tokens "
            "decode back to the poses. Drop a recording or pick an example, then move the slider. Original and "
            "reconstruction play side by side."
        )
        clip = gr.State()
        file = gr.File(label="Recording (.npz or .pose)", file_types=[".npz", ".pose"], height=150, elem_id="file")
        with tempfile.TemporaryDirectory() as folder:  # the page makes copies of its own
            if examples := copy_examples(folder):
                gr.Examples(
                    [[path] for path in examples.values()],
                    file,
                    example_labels=list(examples),
                    label="Examples: a fingerspelled letter",
                    elem_id="examples",
                )
        quality = gr.Slider(
            *(1, max(levels, 2), levels),
            step=1,
            label="Quality",
            info="Levels of the residual quantizer to decode: the tokens of one level are the first of those of two.",
            visible=levels > 1,
            elem_id="quality",
        )
        refusal = gr.HTML(visible=False, elem_id="refusal")
        with gr.Column(visible=False, elem_id="results") as results:
            player = gr.HTML(html_template='<div class="stage"></div>', js_on_load=FRAME, elem_id="player")
            figures = gr.HTML(elem_id="figures")
            with gr.Row():
                tokens = gr.DownloadButton("Tokens (.txt)", size="md", elem_id="tokens")
                poses = gr.DownloadButton("Reconstruction (.npz)", size="md", elem_id="reconstruction")
        gr.Markdown(f"Recordings: {codec.accepts}. What you upload is deleted within two hours.", elem_classes="note")
        shown = [player, figures, tokens, poses]
        options: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}
        file.change(partial(open_file, codec), [file, quality], [clip, refusal, results, *shown], **options)
        options |= {"show_progress": "hidden", "trigger_mode": "always_last"}
        quality.change(partial(move_slider, codec), [clip, quality], shown, **options)
    return page


def serve(model: str, **options: Any) -> gr.Blocks:
    """Serves the page of a model; `options` are those of `gr.Blocks.launch`.

    Raises:
        ModelFolderError: there is no pose tokenizer of that name.
    """
    page = make_page(Codec(model))
    page.launch(
        theme=gr.themes.Default(primary_hue="blue", font=FONT, font_mono=MONOSPACE).set(
            body_text_color_subdued="*neutral_600", block_info_text_color="*neutral_600"
        ),
        css=CSS,
        max_file_size=MAX_BYTES,
        state_session_capacity=MAX_VISITORS,
        footer_links=[],
        ssr_mode=False,
        **options,
    )
    return page


def default_model() -> str:
    """The model that the environment names, else the one that comes with the checkout or the Space."""
    here = next((str(top / DEFAULT_MODEL) for top in (HERE, HERE.parent) if (top / DEFAULT_MODEL).is_dir()), "")
    return os.environ.get("POSE_TOKENIZER_MODEL") or here or DEFAULT_MODEL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder, or repository on the Hub (default: pretrained/small)")
    args = parser.parse_args()
    try:
        serve(args.model or default_model())
    except ModelFolderError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
