"""One folder: what save_pretrained and tdkit.save write, from_pretrained and tdkit.load read, bit for bit."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import tdkit
from tdkit import LowRank, Policy, Rule
from tdkit.decompositions.registered import decompositions
from tdkit.errors import CheckpointError
from tdkit.evaluation.speed import densified
from tdkit.models.registration import attach
from tdkit.models.sites import factorized_layers, num_params, survey
from tdkit.models.swap import swapping
from tests.conftest import make_gpt2, make_llama
from tests.folders import SENTENCE
from tests.kinds import OF_MATRICES

transformers.utils.logging.disable_progress_bar()

every = pytest.mark.parametrize("name", OF_MATRICES)
ROOT = Path(__file__).parents[2]


def compressed(model: Any, name: str = "low_rank") -> Any:
    return tdkit.compress(model, Policy([Rule("*", decompositions.get(name)())], budget=0.6), progress=False)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def without_nulls(found: dict[str, bytes]) -> dict[str, Any]:
    """The same files; of the config the entries that hold something, as older transformers drop the others again."""
    config = {name: value for name, value in json.loads(found["config.json"]).items() if value is not None}
    return {**found, "config.json": config}


def make_bert() -> Any:
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(**sizes, intermediate_size=48, max_position_embeddings=32)
    return transformers.BertForMaskedLM(config).eval()


def make_t5() -> Any:
    sizes = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0)).eval()


def make_vit() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=3)
    ).eval()


def make_mixtral() -> Any:
    """Its experts are stacks of matrices here, and one matrix each in the folders of dense models."""
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**sizes, **heads, max_position_embeddings=32)
    ).eval()


def make_gemma() -> Any:
    """The scale of its embedding is a buffer that no file holds."""
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes, **heads)).eval()


def make_marian() -> Any:
    """transformers leaves its position embeddings out of the folders of dense models."""
    widths = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 2}
    ids = {"vocab_size": 60, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    config = transformers.MarianConfig(
        **widths, **ids, decoder_attention_heads=2, encoder_layers=1, decoder_layers=1, max_position_embeddings=32
    )
    config.forced_eos_token_id = None  # belongs into the generation config
    return transformers.MarianMTModel(config).eval()


MAKERS = [make_gpt2, make_llama, make_bert, make_t5, make_vit, make_mixtral, make_gemma, make_marian]


def inputs(model: Any) -> dict[str, Tensor]:
    ids = torch.randint(2, 40, (2, 7), generator=torch.Generator().manual_seed(1))
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}
    return {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(**inputs(model)).logits
    return found


@pytest.mark.parametrize(
    ("make", "name"),
    [*((make, "permuted_kronecker") for make in MAKERS), (make_gpt2, "low_rank"), (make_t5, "low_rank")],
)
def test_one_folder_serves_both_ways(make: Callable[[], Any], name: str, tmp_path: Path) -> None:
    model = compressed(make(), name)
    expected = logits(model)
    model.save_pretrained(tmp_path / "pretrained")
    tdkit.save(model, tmp_path / "saved")
    assert files(tmp_path / "pretrained") == files(tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(loaded), expected)
    assert num_params(loaded) == num_params(model), "a tie is lost"
    assert [name for name, _ in factorized_layers(loaded)] == [name for name, _ in factorized_layers(model)]
    assert tdkit.applied_plan(loaded) == tdkit.applied_plan(model)
    assert torch.equal(logits(tdkit.load(tmp_path / "pretrained")), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert without_nulls(files(tmp_path / "again")) == without_nulls(files(tmp_path / "saved"))


@every
def test_every_decomposition_travels_by_the_auto_classes(name: str, tmp_path: Path) -> None:
    model = compressed(make_llama(), name)
    model.generation_config.max_new_tokens = 5
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.lm_head.matrix is loaded.model.embed_tokens.matrix
    ids = inputs(model)["input_ids"]
    assert torch.equal(loaded.generate(ids, pad_token_id=0), model.generate(ids, pad_token_id=0))
    loaded.tie_weights()
    assert torch.equal(logits(loaded), logits(model))


def test_layers_keep_the_memory_layout_of_their_factors(tmp_path: Path) -> None:
    for name in OF_MATRICES:
        model = compressed(make_gpt2(), name)
        model.save_pretrained(tmp_path / name)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        for (key, ours), theirs in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
            assert ours.stride() == theirs.stride(), key
            assert not theirs.data_ptr() % 64, key
            assert ours.dtype == theirs.dtype, key


def test_the_dtype_asked_for_is_given(tmp_path: Path) -> None:
    model = compressed(make_llama(), "permuted_kronecker")
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.lm_head.matrix.row_order.dtype == torch.int32
    torch.testing.assert_close(logits(loaded).float(), logits(model), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("cast", ["half", "float", "mixed"])
def test_each_tensor_keeps_its_dtype_when_none_is_asked_for(cast: str, tmp_path: Path) -> None:
    model = compressed(make_llama())
    if cast == "mixed":
        model.to(torch.bfloat16)
        model.model.layers[0].mlp.float()
    else:
        getattr(model, cast)()  # its rotary frequencies, which no file holds, are rounded too
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for (name, ours), theirs in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert ours.dtype == theirs.dtype, name
        assert torch.equal(ours, theirs), name
    if cast != "mixed":
        assert torch.equal(logits(loaded), logits(model))
        getattr(loaded, "float" if cast == "half" else "half")()  # which transformers refuses for quantised models


def test_sharded_files_are_read(tmp_path: Path) -> None:
    model = compressed(make_gpt2(), "permuted_kronecker")
    tdkit.save(model, tmp_path / "saved", max_shard_size="20KB")
    model.save_pretrained(tmp_path / "pretrained", max_shard_size="20KB")
    assert files(tmp_path / "pretrained") == files(tmp_path / "saved")
    assert len(list((tmp_path / "saved").glob("model-*.safetensors"))) > 3
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(model))
    assert torch.equal(logits(tdkit.load(tmp_path / "saved")), logits(model))
    next((tmp_path / "saved").glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match=r"holds no model-00002-of-.*the copy is incomplete"):
        tdkit.load(tmp_path / "saved")


def test_an_index_names_no_files_elsewhere(tmp_path: Path) -> None:
    tdkit.save(compressed(make_gpt2()), tmp_path / "saved", max_shard_size="20KB")
    place = tmp_path / "saved" / "model.safetensors.index.json"
    index = json.loads(place.read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../elsewhere.safetensors")
    place.write_text(json.dumps(index))
    with pytest.raises(
        CheckpointError, match=r"index.json is damaged: .*elsewhere.safetensors.* are no names of files"
    ):
        tdkit.load(tmp_path / "saved")


def test_layers_on_disk_compute_the_same(tmp_path: Path) -> None:
    model = compressed(make_gpt2(), "permuted_kronecker")
    model.save_pretrained(tmp_path / "saved")
    memory = dict.fromkeys(("transformer.wte", "lm_head", "transformer.wpe", "transformer.drop"), "cpu")
    places = {**memory, "transformer.ln_f": "cpu", **{f"transformer.h.{number}": "disk" for number in range(4)}}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert all(parameter.is_meta for parameter in loaded.transformer.h.parameters())
    assert torch.equal(logits(loaded), logits(model))


def test_a_base_model_and_another_head_are_read_from_the_same_folder(tmp_path: Path) -> None:
    model = compressed(make_gpt2(), "permuted_kronecker")
    model.save_pretrained(tmp_path / "head")
    ids = inputs(model)["input_ids"]
    expected = model.transformer(ids).last_hidden_state
    base, found = transformers.AutoModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert torch.equal(base(ids).last_hidden_state, expected)
    assert not any(found.values())
    classifier, found = transformers.GPT2ForSequenceClassification.from_pretrained(
        tmp_path / "head", num_labels=3, pad_token_id=0, output_loading_info=True
    )
    assert torch.equal(classifier.transformer(ids).last_hidden_state, expected)
    assert found["missing_keys"] == {"score.weight"}
    base.save_pretrained(tmp_path / "base")
    again = transformers.GPT2ForSequenceClassification.from_pretrained(tmp_path / "base", pad_token_id=0)
    assert torch.equal(again.transformer(ids).last_hidden_state, expected)
    with pytest.raises(CheckpointError, match=r"a BertForMaskedLM has none of its layers, such as wte"):
        transformers.BertForMaskedLM.from_pretrained(
            tmp_path / "base",
            config=make_bert().config.__class__(quantization_config=base.config.quantization_config.to_dict()),
        )


def test_pipelines_read_the_folder(gpt2_folder: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(gpt2_folder)
    model = compressed(transformers.AutoModelForCausalLM.from_pretrained(gpt2_folder))
    tdkit.save(model, tmp_path / "saved", tokenizer=tokenizer)
    loaded = transformers.pipeline("text-generation", model=str(tmp_path / "saved"), device="cpu")
    given = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    options = {"max_new_tokens": 4, "do_sample": False}
    assert loaded(SENTENCE, **options) == given(SENTENCE, **options)


def test_a_processor_travels(tmp_path: Path) -> None:
    processor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=8000)
    folder = tdkit.save(compressed(make_vit()), tmp_path / "saved", tokenizer=processor)
    assert transformers.Wav2Vec2FeatureExtractor.from_pretrained(folder).sampling_rate == 8000


def test_the_trainer_s_checkpoints_are_such_folders_and_resume(tmp_path: Path) -> None:
    rows = [{"input_ids": torch.arange(8) + row, "labels": torch.arange(8) + row} for row in range(16)]

    def trained(model: Any, resume: Path | None = None) -> Any:
        options = transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=4, save_steps=2, learning_rate=1e-2,
            report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = transformers.Trainer(model, options, train_dataset=rows)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return model.eval()

    model = compressed(make_gpt2(), "permuted_kronecker")
    before = logits(model)
    trained(model)
    assert not torch.equal(logits(model), before)
    checkpoint = tmp_path / "checkpoint-4"
    for loaded in (transformers.AutoModelForCausalLM.from_pretrained(checkpoint), tdkit.load(checkpoint)):
        assert torch.equal(logits(loaded), logits(model))
    again = trained(transformers.AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path / "checkpoint-2")
    assert torch.equal(logits(again), logits(model))


def test_a_loaded_model_is_an_ordinary_one(tmp_path: Path) -> None:
    model = compressed(make_gpt2())
    model.save_pretrained(tmp_path / "saved")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.hf_quantizer.is_trainable
    assert loaded.hf_quantizer.is_qat_trainable
    assert loaded.hf_quantizer.is_serializable()
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert not getattr(loaded, "is_quantized", False)
    assert torch.equal(logits(copy.deepcopy(loaded)), logits(model))
    loaded(**inputs(loaded), labels=inputs(loaded)["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_a_model_without_factors_is_written_as_an_ordinary_folder(tmp_path: Path) -> None:
    model = make_gpt2()
    model.save_pretrained(tmp_path / "pretrained")
    folder = tdkit.save(model, tmp_path / "saved")
    ordinary, ours = files(tmp_path / "pretrained"), files(folder)
    assert set(ours) == {*ordinary, "tdkit.json"}
    assert {name: ours[name] for name in ordinary} == ordinary
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(folder)), logits(model))
    was = compressed(make_gpt2(tie_word_embeddings=False))
    was.save_pretrained(tmp_path / "compressed")  # its config has a description now
    dense: Any = densified(was)
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), logits(dense))


def test_saving_leaves_the_model_and_its_config_alone(tmp_path: Path) -> None:
    for model in (make_gpt2(), compressed(make_gpt2())):
        before, state = copy.deepcopy(vars(model.config)), {name: id(value) for name, value in vars(model).items()}
        tdkit.save(model, tmp_path / "saved", overwrite=True)
        assert vars(model.config) == before
        assert {name: id(value) for name, value in vars(model).items() if name in state} == state


def test_the_state_that_save_pretrained_is_given_is_written(tmp_path: Path) -> None:
    """As the Trainer gives what it gathers from the shards of a model: copies, also of tied tensors."""
    model = compressed(make_gpt2(), "permuted_kronecker")
    expected = logits(model)
    given = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.save_pretrained(tmp_path, state_dict=given)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), expected)
    assert num_params(loaded) == num_params(model)


def remove(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def described(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= entries
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: remove(f, "transformer.h.0.mlp.c_fc.matrix.left"),
            "the files lack transformer.h.0.mlp.c_fc.matrix.l",
        ),
        (lambda f: remove(f, "transformer.h.1.mlp.c_fc.bias"), "the files lack transformer.h.1.mlp.c_fc.bias"),
        (lambda f: remove(f, "transformer.wte.matrix.left"), "the files lack transformer.wte.matrix.left"),
        (lambda f: described(f, version=9), "has format version 9, this tdkit reads up to 2: update tdkit"),
        (lambda f: described(f, layers=7), "is damaged: 'layers' is missing or malformed"),
        (lambda f: described(f, layers=[7]), "layer 0: 7 is not a layer"),
    ],
)
def test_what_is_missing_or_damaged_is_told_and_nothing_is_made_up(damage: Any, message: str, tmp_path: Path) -> None:
    compressed(make_gpt2()).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError):
        tdkit.load(tmp_path)


def test_factors_of_other_sizes_are_told(tmp_path: Path) -> None:
    compressed(make_gpt2()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["transformer.h.0.mlp.c_fc.matrix.left"] = torch.zeros(3, 3)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"hold transformer.h.0.mlp.c_fc.matrix.left as \(3, 3\), the description"
    ):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_config_of_factors_makes_no_factors(tmp_path: Path) -> None:
    model = compressed(make_gpt2())
    model.save_pretrained(tmp_path / "saved")
    make_gpt2().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", quantization_config=model.config.quantization_config
        )


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new interpreter."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False, env=environment
    )


def test_without_tdkit_transformers_refuses_the_folder(gpt2_folder: Path, tmp_path: Path) -> None:
    """As in transformers 5.0.0, where it was tried by hand."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(gpt2_folder)
    model = compressed(transformers.AutoModelForCausalLM.from_pretrained(gpt2_folder), "permuted_kronecker")
    folder = str(tdkit.save(model, tmp_path / "saved", tokenizer=tokenizer))
    done = run(
        f"""
import sys, transformers
calls = [getattr(transformers, name).from_pretrained for name in {[*AUTO, "GPT2LMHeadModel"]}]
for call in (*calls, lambda folder: transformers.pipeline("text-generation", model=folder)):
    try:
        call({folder!r})
        print("loaded")
    except (RuntimeError, ValueError) as error:
        refusal = "You set `ignore_mismatched_sizes` to `False`, thus raising an error"
        print("refused" if refusal in str(error) else error)
assert "tdkit" not in sys.modules
"""
    )
    assert done.stdout.splitlines() == ["refused"] * 5, done.stderr
    assert done.stderr.count("Unknown quantization type, got tdkit") >= 5


AUTO = ("AutoModelForCausalLM", "AutoModel", "AutoModelForSequenceClassification")

ORDERS = {
    "tdkit first": "import tdkit\nassert 'transformers' not in sys.modules\nimport transformers",
    "transformers loaded": "import transformers\ntransformers.GPT2LMHeadModel\nimport tdkit",
}


@pytest.mark.parametrize("order", ORDERS)
def test_importing_tdkit_is_enough_in_any_order(order: str, tmp_path: Path) -> None:
    compressed(make_gpt2()).save_pretrained(tmp_path)
    load = f"transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    done = run(f"import sys\n{ORDERS[order]}\nprint(type({load}.transformer.wte).__name__)")
    assert done.stdout == "FactorizedEmbedding\n", done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_from_pretrained_makes_nothing_dense(tmp_path: Path) -> None:
    """The peak of a process of its own that loads a hundredth of 112 MiB of dense weights."""
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 2, "num_attention_heads": 8}
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=1024))
    dense = num_params(model) * 4
    with swapping(model) as swap:  # random factors: no time for fits
        swap.put([(site, LowRank(rank=4).empty(site.shape, device="meta")) for site in survey(model).sites])
    attach(model)
    model.to_empty(device="cpu")
    model.save_pretrained(tmp_path)
    code = f"""
import tdkit.models.quantizer, transformers
from pathlib import Path
transformers.LlamaForCausalLM
transformers.utils.logging.disable_progress_bar()
def peak():  # ru_maxrss would begin with that of the parent
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
Path("/proc/self/clear_refs").write_text("5")  # begin at what is held now
before = peak()
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
compressed = peak()
del model.config.quantization_config
dense = transformers.LlamaForCausalLM(model.config)
print(compressed - before, peak() - compressed)
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    for_factors, for_dense = map(int, done.stdout.split())
    assert for_dense > dense / 2, "the measurement would not see a dense model"
    assert for_factors < dense / 4
