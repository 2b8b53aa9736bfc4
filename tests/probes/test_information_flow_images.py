"""Prompt tokens that reach the image: a tiny random Stable Diffusion proves the plumbing."""

import pytest
import torch

from probes.information_flow_images import keep_sets, measure_images
from tests.encoders import tiny_clip, tiny_encoder, tiny_tokenizer
from workbench.errors import CapabilityError, DataError, ModelError
from workbench.models.diffusion import ClipJudge, Drawing, TextToImage

pytest.importorskip("diffusers", reason="the optional extra `diffusion` is not installed")
pytestmark = pytest.mark.filterwarnings(
    # Deprecations inside diffusers; nothing of ours can change them.
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
)

TEXT, ITEMS = "the red starfish by a pool", ["red starfish", "pool"]
ROW = {"text": TEXT, "items": ITEMS}
N_POS = 12
QUICK = Drawing(steps=2, guidance=1.0, size=16, at_once=5)


@pytest.fixture(scope="module")
def pipeline():
    import diffusers

    tokenizer = tiny_tokenizer("clip")
    tokenizer.model_max_length = N_POS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=4,
        )
        vae = diffusers.AutoencoderKL(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        )
    return diffusers.StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=tiny_encoder("clip"),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="module")
def drawer(pipeline):
    return TextToImage(pipeline)


def brightness(images, texts):
    """A judge whose answer is known: how red and how green an image is."""
    return images.mean(dim=(2, 3))[:, : len(texts)]


def test_keep_sets_divide_the_prompt():
    of_pos = torch.tensor([-1, 0, 0, -1, 1, -1, -1])
    sets = keep_sets(of_pos, 6, 2)
    assert list(sets) == [
        "full", "tokens", "pads", "item 0", "item 1", "token 1", "token 2", "token 4",
    ]  # fmt: skip
    assert bool((sets["tokens"] ^ sets["pads"]).all())
    assert sets["item 0"].nonzero()[:, 0].tolist() == [1, 2]
    assert sets["token 4"].nonzero()[:, 0].tolist() == [4]


def test_the_encoding_is_the_text_encoders_and_the_same_from_tokens(drawer):
    tokens = drawer.tokens(TEXT)
    assert len(tokens) == N_POS
    with torch.no_grad():
        wanted = tiny_encoder("clip")(tokens[None]).last_hidden_state[0]
    torch.testing.assert_close(drawer.encode(TEXT), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(drawer.encode_tokens(tokens), wanted, rtol=0, atol=1e-5)


def test_the_full_keep_set_draws_what_the_pipeline_draws(drawer, pipeline):
    found = measure_images(drawer, ROW, brightness, drawing=QUICK)
    image = pipeline(
        TEXT,
        num_inference_steps=2,
        guidance_scale=1.0,
        height=16,
        width=16,
        generator=torch.Generator().manual_seed(42),
        output_type="pt",
    ).images[0]
    torch.testing.assert_close(found.images[0], image, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.score, brightness(found.images, ITEMS))


def test_prompt_tokens_reach_the_image_and_the_empty_prompt_does_not(drawer):
    found = measure_images(drawer, ROW, brightness, drawing=QUICK)
    change = dict(zip(found.names, found.change.tolist(), strict=True))
    assert change["full"] > 0
    # <bos> the red star ##fish by a pool <eos>
    assert {name for name in change if name.startswith("token ")} == {
        "token 2", "token 3", "token 4", "token 7",
    }  # fmt: skip
    assert all(change[name] > 0 for name in change)
    nothing = drawer.draw(drawer.encode("")[None].repeat(2, 1, 1), QUICK)
    assert torch.equal(nothing[0], nothing[1])
    apart = (found.images - nothing[0]).square().mean(dim=(1, 2, 3)).sqrt()
    torch.testing.assert_close(found.change, apart, rtol=1e-4, atol=1e-5)


def test_a_planted_judge_finds_the_planted_token(drawer):
    def judge(images, texts):
        # Images come in the order of the names: full, tokens, pads, two items, four tokens, two repairs.
        score = torch.full((len(images), 2), 0.1)
        score[3, 0] = score[4, 1] = 1.0
        score[6, 0], score[5, 0], score[8, 1] = 0.9, 0.7, 0.85
        return score

    found = measure_images(drawer, ROW, judge, drawing=QUICK)
    assert found.representative.nonzero()[:, 0].tolist() == [3, 7]
    assert found.of("token 3").tolist() == pytest.approx([0.9, 0.1])


def test_the_repair_puts_the_item_alone_in_its_place(drawer):
    drawn = []

    class Recorder(TextToImage):
        def draw(self, encodings, drawing):
            drawn.append(encodings)
            return torch.zeros(len(encodings), 3, 4, 4)

    measure_images(Recorder(drawer.pipeline), ROW, brightness, drawing=QUICK)
    (encodings,) = drawn
    full, repaired = encodings[0], encodings[-3]
    assert torch.equal(repaired[[0, 1, 5, 6, 7, 8]], full[[0, 1, 5, 6, 7, 8]])
    tokens = drawer.tokens(TEXT)
    alone = torch.ones_like(tokens)
    alone[0], alone[2:5] = 0, tokens[2:5]
    torch.testing.assert_close(repaired[2:5], drawer.encode_tokens(alone)[2:5])
    assert not torch.allclose(repaired[2:5], full[2:5])


def test_clip_similarity_is_that_of_transformers_own_pieces():
    model = tiny_clip()
    tokenizer = tiny_tokenizer("clip")
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = ClipJudge(model, tokenizer)(images, ITEMS)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    with torch.no_grad():
        for image in range(3):
            pooled = model.vision_model((images[image : image + 1] - mean) / std).pooler_output
            seen = model.visual_projection(pooled)[0]
            for text, words in enumerate(ITEMS):
                ids = torch.tensor([tokenizer(words)["input_ids"]])
                said = model.text_projection(model.text_model(ids).pooler_output)[0]
                cosine = torch.cosine_similarity(seen, said, dim=0)
                assert found[image, text].item() == pytest.approx(cosine.item(), abs=1e-5)


def test_a_saved_pipeline_loads_and_draws_the_same(drawer, pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = TextToImage.load(str(tmp_path))
    encoding = drawer.encode(TEXT)[None]
    torch.testing.assert_close(loaded.draw(encoding, QUICK), drawer.draw(encoding, QUICK))


def test_what_cannot_be_drawn_is_refused(drawer, tmp_path):
    with pytest.raises(DataError, match="at most 12"):
        measure_images(drawer, {"text": "a cat " * 9, "items": ["cat"]}, brightness)
    with pytest.raises(DataError, match="no 'table'"):
        measure_images(drawer, {"text": TEXT, "items": ["table"]}, brightness)
    with pytest.raises(CapabilityError, match="one text encoder"):
        TextToImage(object())
    with pytest.raises(ModelError, match="diffusers pipeline"):
        TextToImage.load(str(tmp_path))
    with pytest.raises(ModelError, match="folder of a CLIP"):
        ClipJudge.load(str(tmp_path))
