"""Bad values of fields and bad command lines; none of them may need data, a model or Ray to be seen."""

from dataclasses import replace
from pathlib import Path

from bad_inputs.harness import Case

_SAMPLE = ["--model", "model", "--output", "out", "--num_images", "4"]
_EVALUATE = ["--model", "model", "--data", "data", "--output", "out"]
_REQUIRED = {"sample.py": _SAMPLE, "evaluate.py": _EVALUATE, "ingest.py": ["--source", "photos", "--output", "out"]}


def _case(command: str, option: str, value: str, *says: str, name: str = "") -> Case:
    def build(at: Path) -> list[str]:
        return [command, *_REQUIRED.get(command, []), f"--{option}", value]

    return Case(f"Field of {command}", name or f"`--{option} {value}`", build, says, code=2)


def _network(option: str, value: str, *says: str) -> Case:
    """What only the images tell: the embedded ones, which stay prepared."""
    case = _case("train.py", option, value, *says)
    return replace(case, leaves=("ddpm", "ddpm/data*"))


def _line(name: str, says: str, *command: str) -> Case:
    return Case("Command line", name, lambda at: list(command), (says,), code=2)


def _together(*options: str, says: str) -> Case:
    """Fields of a training that do not fit each other."""
    name = "`" + " ".join(f"--{option}" for option in options) + "`"
    words = [word for option in options for word in f"--{option}".split()]
    return Case("Field of train.py", name, lambda at: ["train.py", *words], (says,), code=2)


CASES = [
    _line("unknown option", "--nosuch", "train.py", "--nosuch", "1"),
    _line("an abbreviated option", "did you mean --train.steps?", "train.py", "--train.step", "5"),
    _line("a flag with a word that is none", "dry_run", "sample.py", *_SAMPLE, "--dry_run", "perhaps"),
    _line("an argument too many", "unrecognized", "train.py", "surplus"),
    _line("a required field is missing", "output", "ingest.py", "--source", "photos"),
    _line("ledger without a run", "give one run directory", "ledger"),
    _line("ledger of two runs", "give one run directory", "ledger", "a", "b"),
    _line("verify without an output", "uri", "verify.py"),
    _case("train.py", "name", "../../outside", "name = '../../outside': must consist of letters, digits"),
    _case("train.py", "name", "..", "name = '..': must consist of letters, digits"),
    _case("train.py", "name", "/outside", "must consist of letters, digits"),
    _case("train.py", "name", "", "name = '': must consist of letters, digits", name="an empty `name`"),
    _case("train.py", "name", "a\x1b[2Jb", "a\\x1b[2Jb", name="a `name` that clears the terminal"),
    _case("train.py", "name", "a" * 300, "must consist of", "at most", name="a `name` of 300 letters"),
    _case("train.py", "root", "", "root = ''", name="an empty `root`"),
    _case("train.py", "tracking.model_name", "a/b:c", "tracking.model_name = 'a/b:c': must not"),
    _case("train.py", "train.steps", "0", "train.steps = 0: must be at least 1"),
    _case("train.py", "train.steps", "1e300", "train.steps"),
    _case("train.py", "train.steps", "1000000000000", "train.steps = 1000000000000: must be at most"),
    _case("train.py", "train.learning_rate", ".nan", "train.learning_rate = nan: must be positive and finite"),
    _case("train.py", "train.learning_rate", ".inf", "train.learning_rate = inf: must be positive and finite"),
    _case("train.py", "train.weight_decay", ".inf", "train.weight_decay = inf: must be"),
    _case("train.py", "train.grad_clip", ".nan", "train.grad_clip = nan: must be positive"),
    _case("train.py", "train.ema_decay", "1.0", "train.ema_decay = 1.0: must be in [0, 1)"),
    _case("train.py", "seed", "-1", "seed = -1: must not be negative"),
    _case("train.py", "batch_size", "1000000000000", "batch_size = 1000000000000: must be in 1..1048576"),
    _case("train.py", "train.optimizer", "sgd", "train.optimizer", "adamw"),
    _case("train.py", "diffusion.beta_start", ".5", "diffusion.beta_start = 0.5: must not exceed beta_end"),
    _case("train.py", "diffusion.betas", "[0.1, .nan]", "diffusion.betas[1] = nan: must be in (0, 1)"),
    _case("train.py", "diffusion.num_timesteps", "1000000000000", "diffusion.num_timesteps = 1000000000000: must be"),
    _together(
        "diffusion.zero_terminal_snr true", says="diffusion.prediction = 'eps': must be x_0 or v with zero_terminal"
    ),
    _together(
        "diffusion.schedule gamma_linear",
        "network.learned_variance true",
        "train.loss vlb",
        says="network.learned_variance = True: must be false with schedule gamma_linear, which has no betas",
    ),
    _together("train.loss hybrid", says="train.loss = 'hybrid': must not be hybrid without network.learned_variance"),
    _together("diffusion.schedule edm", "train.times importance", says="train.times = 'importance': must not be"),
    _together(
        "diffusion.schedule gamma_learned", says="train.loss = 'simple': must be vlb with schedule gamma_learned"
    ),
    _together(
        "diffusion.schedule gamma_linear",
        "validation.sigma2 beta",
        says="validation.sigma2 = 'beta': must be auto or beta_tilde with schedule gamma_linear",
    ),
    _case(
        "train.py", "validation.num_timesteps", "1001", "validation.num_timesteps = 1001: must be at most the number"
    ),
    _case("train.py", "diffusion.gamma_min", "5", "diffusion.gamma_min = 5.0: must be below gamma_max = 5.0"),
    _case("train.py", "network.fourier_features", "[6, 17]", "network.fourier_features: (6, 17) are not rising whole"),
    _case("train.py", "network.num_classes", "0", "network.num_classes: 0 is not a whole number in 1..1,000,000"),
    _case("train.py", "network.num_classes", "many", "network.num_classes"),
    _network("network.num_classes", "9", "network.num_classes = 9: must be auto, or 10: so many classes are named in"),
    _together(
        "network.num_classes auto",
        "train.label_dropout 1.1",
        says="train.label_dropout = 1.1: must be in [0, 1]",
    ),
    _together(
        "network.num_classes auto", "train.label_dropout .nan", says="train.label_dropout = nan: must be in [0, 1]"
    ),
    _case(
        "train.py",
        "train.label_dropout",
        "0.2",
        "train.label_dropout = 0.2: must be left out without network.num_classes",
    ),
    _case("train.py", "network.base_channels", "1000000", "network.base_channels", "1000000"),
    _case("train.py", "network.num_res_blocks", "1000000000", "network.num_res_blocks", "1000000000"),
    _network("network.channel_multipliers", "[1, 2, 2, 2, 2, 2, 2, 2]", "network.image_size", "use fewer"),
    _network("data.hold_out", "2000", "data.validation = 'held-out': holds out none of 1,498 rows", "at most 1498"),
    _case("train.py", "data.hold_out", "1", "data.hold_out = 1: must be at least 2, or 0"),
    _network("network.attention_resolutions", "[3]", "network.attention_resolutions", "a height that no level has"),
    _case("train.py", "network.num_groups", "7", "network.base_channels", "num_groups (7)"),
    _case("train.py", "network.dropout", ".nan", "network.dropout", "nan"),
    _case("train.py", "cluster.num_workers", "[3, 1]", "cluster.num_workers = (3, 1): must be >= 1"),
    _case("train.py", "cluster.cpus_per_worker", ".inf", "cluster.cpus_per_worker = inf: must be"),
    _case("train.py", "cluster.gpus_per_worker", "0.5", "cluster.gpus_per_worker = 0.5: must be 0 or a whole number"),
    _case("train.py", "cluster.use_gpu", "true", "--cluster.use_gpu is now --cluster.gpus_per_worker; write --cluster"),
    _case("sample.py", "dtype", "float32", "--dtype is now --precision; write --precision fp32"),
    _case("train.py", "checkpoint.keep", "1", "checkpoint.keep = 1: must be at least 2"),
    _case("ingest.py", "max_rejected_fraction", ".nan", "max_rejected_fraction = nan: must be in [0, 1]"),
    _case("ingest.py", "image_size", "100000", "image_size = 100000: must be in 1..4096"),
    _case("ingest.py", "channels", "2", "channels", "2"),
    _case("ingest.py", "shard_mib", "1000000", "shard_mib = 1000000: must be in 1..2048"),
    _case(
        "ingest.py", "background", "see-through", "background = 'see-through': must be a colour's name, or '#rrggbb'"
    ),
    _case("ingest.py", "format", "zip", "format", "zip", "tar"),
    _case("sample.py", "num_images", "1000000000000000000", "num_images = 1000000000000000000: must be"),
    _case("sample.py", "batch_size", "1000000000000", "batch_size = 1000000000000: must be"),
    _case("sample.py", "seed", "tomorrow", "seed = 'tomorrow': must be a number >= 0, or '{date}'"),
    _case("sample.py", "date", "2026-02-30", "date = '2026-02-30': must be a date such as"),
    _case("sample.py", "cluster.gpus_per_worker", "1.5", "cluster.gpus_per_worker = 1.5: must be in [0, 1) or whole"),
    _case("sample.py", "cluster.gpus_per_worker", ".inf", "cluster.gpus_per_worker = inf: must be"),
    _case("sample.py", "sampler.eta", ".nan", "sampler.eta = nan: must be in [0, 1]"),
    _case("sample.py", "sampler.eta", "0.5", "sampler.eta = 0.5: is a parameter of --sampler.name ddim"),
    _case("sample.py", "sampler.name", "euler", "sampler.name"),
    _case("sample.py", "sampler.tolerance", "0", "sampler.tolerance = 0.0: must be finite and above 0"),
    _case("sample.py", "sampler.tolerance", "0.01", "sampler.tolerance = 0.01: needs a sampler without noise"),
    _case("sample.py", "sampler.churn", "5", "sampler.churn = 5.0: is a parameter of --sampler.name heun"),
    _case("sample.py", "sampler.spacing", "karras", "sampler.spacing"),
    _case("sample.py", "dynamic_threshold", "0", "dynamic_threshold = 0.0: must be a percentile in (0, 100]"),
    _case("sample.py", "interpolate", "[0,1]", "interpolate = (0, 1): needs a sampler without noise"),
    _case("sample.py", "sampler", "ddim", "--sampler is now --sampler.name; write --sampler.name ddim"),
    _case("evaluate.py", "target_halfwidth", ".inf", "target_halfwidth = inf: must be"),
    _case("evaluate.py", "num_timesteps", "1", "num_timesteps = 1: must be in 2.."),
    _case("evaluate.py", "timesteps_per_image", "7", "timesteps_per_image = 7: must be an even number"),
    _case("evaluate.py", "ode.steps", "5", "ode.steps = 5: must be an even number"),
    _case("evaluate.py", "shard_size", "100", "shard_size = 100: must be a multiple of 16"),
    Case(
        "Field of verify.py",
        "`--recompute .nan`",
        lambda at: ["verify.py", "out", "--recompute", ".nan"],
        ("recompute = nan: must be in [0, 1]",),
        code=2,
    ),
]


def _uri(name: str, says: tuple[str, ...], *command: str, code: int = 1) -> Case:
    return Case("URI", name, lambda at: list(command), says, code)


_NO_SECRET = "s3://...@bucket: must not carry credentials; set them in the environment"
_TO_SECRET = "s3://key:topsecret@bucket/images"
CASES += [
    _uri("credentials in a source", (_NO_SECRET,), "ingest.py", "--source", _TO_SECRET, "--output", "out"),
    _uri(
        "credentials in an output",
        (_NO_SECRET,),
        "ingest.py",
        "--source",
        "embedded://digits/test",
        "--output",
        _TO_SECRET,
    ),
    _uri(
        "credentials in a model",
        (_NO_SECRET,),
        "sample.py",
        "--num_images",
        "4",
        "--output",
        "out",
        "--model",
        _TO_SECRET,
    ),
    _uri("credentials in a root", (_NO_SECRET,), "train.py", "--root", _TO_SECRET),
    _uri("an unknown protocol", ("unknown protocol 'gopher'; use a path or s3://",), "verify.py", "gopher://host/out"),
    _uri("no bucket", ("the bucket is missing; write s3://bucket/prefix",), "verify.py", "s3:///out"),
    _uri("zero byte in a path", ("location = 'out\\x00put': holds a NUL character",), "verify.py", "out\0put"),
    _uri("a path of 5,000 letters", ("a" * 5000,), "verify.py", "a" * 5000),
    _uri(
        "an unknown embedded data set",
        ("embedded://digits/all", "choose"),
        "train.py",
        "--data.train",
        "embedded://digits/all",
        code=2,
    ),
]
