//! Files of `Edifice.SSM.Hymba` (Elixir, Axon): their names, their order of axes, and [`Hymba::load_edifice`].

use std::ops::Range;
use std::path::Path;

use ndarray::{Axis, Slice};

use super::model::Hymba;
use super::options::HymbaOptions;
use super::size::{fits, model_bytes};
use super::variant::Variant;
use crate::Result;
use crate::files::comparison::Comparison;
use crate::files::tensors::{Source, Tensors};
use crate::files::{header, nx};

impl Hymba {
    /// Reads the parameters of a model that was trained with `Edifice.SSM.Hymba` 0.2.0.
    ///
    /// Two formats are read, and told apart by their first bytes:
    ///
    /// * what `Nx.serialize` gives for the model state, or for its `data`: layers by name, parameters by name;
    /// * safetensors, each tensor named `<layer>.<parameter>`, as `hymba_block_1_attn_q.kernel`.
    ///
    /// Tensors may be f32, f64, f16 or bf16; all become f32. The state of dropout layers is ignored.
    ///
    /// The file does not hold the options, so they must be given. Every name and shape is checked against them, and an
    /// option that does not fit the file is named; but `num_heads` leaves no trace in a file, and a wrong number of
    /// heads is another model. The variant becomes [`Variant::Edifice`] whatever the options say.
    ///
    /// The file need not be trusted. Reading takes no more memory than twice its length and a few megabytes.
    ///
    /// ```no_run
    /// use hymba::{Hymba, HymbaOptions};
    ///
    /// let model = Hymba::load_edifice("policy.nx", HymbaOptions::edifice(287).num_layers(2))?;
    /// # Ok::<(), hymba::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Option`](crate::Error::Option) when the options are not usable, [`Error::Io`](crate::Error::Io) when the
    /// file cannot be read, [`Error::Format`](crate::Error::Format) when it is damaged, hostile, or of another format,
    /// and [`Error::Tensors`](crate::Error::Tensors), with the whole list, when tensors are missing, unexpected or of the
    /// wrong shape or type.
    pub fn load_edifice(path: impl AsRef<Path>, mut options: HymbaOptions) -> Result<Hymba> {
        options.variant = Variant::Edifice;
        options.validate()?;
        let mut tensors = read(path.as_ref())?;
        tensors.retain(|name| !is_dropout_key(name));

        let mappings = mappings(&options);
        // a file cannot hold more blocks than tensors, and the options may ask for millions; of one more it lacks some
        let blocks = options.num_layers.min(tensors.names().len() / TENSORS_OF_A_BLOCK + 1);
        let mut comparison = Comparison::new(&tensors, differences(&options, &tensors));
        for mapping in &mappings {
            let names = if mapping.is_of_a_block() { blocks } else { 1 };
            (0..names).for_each(|block| comparison.expect(&mapping.name(block), &mapping.shape));
        }
        comparison.finish()?;
        if !fits(model_bytes(&options, None)) {
            return Err(tensors.error("its model does not fit into memory"));
        }

        let mut model = Hymba::zeros(options, None);
        let mut filled = Ok(());
        model.visit_mut(&mut |ours, mut array| {
            let (block, ours) = without_block(ours);
            for mapping in mappings.iter().filter(|mapping| mapping.ours == ours) {
                if filled.is_ok() {
                    let rows = array.slice_axis_mut(Axis(0), Slice::from(mapping.rows.clone()));
                    let rows = if mapping.transposed { rows.reversed_axes() } else { rows };
                    filled = tensors.read_into(&mapping.name(block), rows);
                }
            }
        });
        filled.map(|()| model)
    }
}

fn read(path: &Path) -> Result<Tensors<'_>> {
    let mut source = Source::open(path)?;
    if nx::starts(&source.first_bytes()?) {
        return nx::read(source);
    }
    match header::read(source)? {
        (tensors, None) => Ok(tensors),
        (tensors, Some(_)) => Err(tensors.error("it was written by Hymba::save; read it with Hymba::load")),
    }
}

/// `dropout_<l>.key`: a random key, which a state trained with dropout has beside its parameters.
fn is_dropout_key(name: &str) -> bool {
    let layer = name.strip_prefix("dropout_").and_then(|name| name.strip_suffix(".key"));
    layer.is_some_and(|layer| layer.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Tensors that Edifice writes of a block.
const TENSORS_OF_A_BLOCK: usize = 30;

/// Where one tensor of a file belongs, or one of each block.
struct Mapping {
    /// Its name in the file, in which `{}` stands for the block.
    file: String,
    /// Its shape in the file.
    shape: Vec<usize>,
    /// Our tensor, in which `{}` stands for the block, and which rows of it this one is.
    ours: String,
    rows: Range<usize>,
    /// Axon's kernels are `[in, out]`; ours are `[out, in]`.
    transposed: bool,
}

impl Mapping {
    fn is_of_a_block(&self) -> bool {
        self.file.contains("{}")
    }

    /// Its name in the file.
    fn name(&self, block: usize) -> String {
        self.file.replace("{}", &theirs(block))
    }
}

/// The number of the block in one of our names, which is replaced by `{}`.
fn without_block(ours: &str) -> (usize, String) {
    let of_a_block = ours.strip_prefix("blocks.").and_then(|name| name.split_once('.'));
    match of_a_block.and_then(|(block, name)| Some((block.parse().ok()?, name))) {
        Some((block, name)) => (block, format!("blocks.{{}}.{name}")),
        None => (0, ours.to_string()),
    }
}

/// The tensors that Edifice writes.
fn mappings(options: &HymbaOptions) -> Vec<Mapping> {
    let (e, h, n, k) = (options.embed_dim, options.hidden_size, options.state_size, options.num_meta_tokens);
    let (d, r) = (options.inner_size(), options.dt_rank());
    let mut mappings = Vec::new();
    let mut mapping = |file: String, ours: String, shape: &[usize], rows: Range<usize>, transposed: bool| {
        mappings.push(Mapping { file, shape: shape.to_vec(), ours, rows, transposed });
    };
    let mut linear = |file: &str, ours: &str, kernel: &[usize], first_row: usize| {
        let outputs = kernel[kernel.len() - 1];
        let rows = first_row..first_row + outputs;
        mapping(format!("{file}.kernel"), format!("{ours}.weight"), kernel, rows.clone(), true);
        mapping(format!("{file}.bias"), format!("{ours}.bias"), &[outputs], rows, false);
    };

    if e != h {
        linear("input_projection", "input_proj", &[e, h], 0);
    }
    // their layer, ours, the shape of their kernel, and the first row it has in our weight
    let linears: [(&str, &str, &[usize], usize); 13] = [
        ("{}_mamba_in_proj", "blocks.{}.mamba.in_proj", &[h, 2 * d], 0),
        ("{}_mamba_conv", "blocks.{}.mamba.conv", &[4, 1, d], 0),
        ("{}_mamba_ssm_dt_rank", "blocks.{}.mamba.x_proj", &[d, r], 0),
        ("{}_mamba_ssm_bc_proj", "blocks.{}.mamba.x_proj", &[d, 2 * n], r),
        ("{}_mamba_ssm_dt_proj", "blocks.{}.mamba.dt_proj", &[r, d], 0),
        ("{}_mamba_out_proj", "blocks.{}.mamba.out_proj", &[d, h], 0),
        ("{}_attn_q", "blocks.{}.attention.q_proj", &[h, h], 0),
        ("{}_attn_k", "blocks.{}.attention.k_proj", &[h, h], 0),
        ("{}_attn_v", "blocks.{}.attention.v_proj", &[h, h], 0),
        ("{}_attn_out_proj", "blocks.{}.attention.out_proj", &[h, h], 0),
        ("{}_fusion_gate_proj", "blocks.{}.gate", &[h, h], 0),
        ("{}_ffn_up", "blocks.{}.ffn.up", &[h, 4 * h], 0),
        ("{}_ffn_down", "blocks.{}.ffn.down", &[4 * h, h], 0),
    ];
    for (file, ours, kernel, first_row) in linears {
        linear(file, ours, kernel, first_row);
    }
    let mut norm = |file: &str, ours: &str| {
        mapping(format!("{file}.gamma"), format!("{ours}.weight"), &[h], 0..h, false);
        mapping(format!("{file}.beta"), format!("{ours}.bias"), &[h], 0..h, false);
    };
    norm("{}_norm", "blocks.{}.norm");
    norm("{}_ffn_norm", "blocks.{}.ffn_norm");
    norm("final_norm", "final_norm");
    if k > 0 {
        for name in ["meta_k", "meta_v"] {
            mapping(meta("{}", name), format!("blocks.{{}}.attention.{name}"), &[k, h], 0..k, false);
        }
    }
    mappings
}

/// Edifice's name of our block; it counts from 1.
fn theirs(block: usize) -> String {
    format!("hymba_block_{}", block + 1)
}

fn meta(block: &str, name: &str) -> String {
    format!("{block}_attn_compute.{block}_{name}")
}

/// The options that do not fit the file, by the shapes of a few tensors that tell them.
fn differences(options: &HymbaOptions, tensors: &Tensors) -> Vec<String> {
    let axis = |name: &str, axis: usize| tensors.shape(name).and_then(|shape| shape.get(axis).copied());
    let hidden_size = axis("final_norm.gamma", 0);
    let num_layers = (0..).take_while(|&block| axis(&format!("{}_norm.gamma", theirs(block)), 0).is_some()).count();
    [
        ("embed_dim", options.embed_dim, axis("input_projection.kernel", 0).or(hidden_size)),
        ("hidden_size", options.hidden_size, hidden_size),
        ("state_size", options.state_size, axis("hymba_block_1_mamba_ssm_bc_proj.bias", 0).map(|width| width / 2)),
        ("num_layers", options.num_layers, (num_layers > 0).then_some(num_layers)),
        ("num_meta_tokens", options.num_meta_tokens, axis(&meta(&theirs(0), "meta_k"), 0)),
    ]
    .into_iter()
    .filter_map(|(option, given, found)| {
        let found = found.filter(|&found| found != given)?;
        Some(format!("{option} is {given} in the options and seems to be {found} in the file"))
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use ndarray::{ArrayD, IxDyn};

    use super::*;

    fn file(name: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/edifice/small").join(name)
    }

    fn options() -> HymbaOptions {
        HymbaOptions::new(6).hidden_size(8).num_layers(2).num_heads(2).num_meta_tokens(2)
    }

    fn parameters(model: &Hymba) -> BTreeMap<String, ArrayD<f32>> {
        let mut all = BTreeMap::new();
        model.visit(&mut |name, array| {
            all.insert(name.to_string(), array.to_owned());
        });
        all
    }

    /// A tensor as it lies in the file.
    fn stored(name: &str, shape: &[usize]) -> ArrayD<f32> {
        let mut array = ArrayD::zeros(IxDyn(shape));
        read(&file("model.safetensors")).unwrap().read_into(name, array.view_mut()).unwrap();
        array
    }

    #[test]
    fn the_formats_give_the_same_model() {
        let model = Hymba::load_edifice(file("model.safetensors"), options()).unwrap();
        assert_eq!(model.options().variant, Variant::Edifice);
        for name in ["model.nx", "model_data.nx"] {
            assert_eq!(parameters(&Hymba::load_edifice(file(name), options()).unwrap()), parameters(&model));
        }
    }

    #[test]
    fn every_tensor_has_its_place() {
        let model = parameters(&Hymba::load_edifice(file("model.nx"), options()).unwrap());
        let ours = |name: &str| &model[name];
        let block = "hymba_block_2_";

        let kernel = stored("input_projection.kernel", &[6, 8]);
        assert_eq!(ours("input_proj.weight"), kernel.t());
        assert_eq!(ours("final_norm.bias"), stored("final_norm.beta", &[8]));
        assert_eq!(ours("blocks.1.ffn_norm.weight"), stored(&format!("{block}ffn_norm.gamma"), &[8]));
        assert_eq!(ours("blocks.1.attention.meta_v"), stored(&meta(&theirs(1), "meta_v"), &[2, 8]));
        let kernel = stored(&format!("{block}mamba_conv.kernel"), &[4, 16]);
        assert_eq!(ours("blocks.1.mamba.conv.weight"), kernel.t());

        let x_proj = ours("blocks.1.mamba.x_proj.weight");
        let (rank, rest) = x_proj.view().split_at(Axis(0), 1);
        assert_eq!(rank, stored(&format!("{block}mamba_ssm_dt_rank.kernel"), &[16, 1]).t());
        assert_eq!(rest, stored(&format!("{block}mamba_ssm_bc_proj.kernel"), &[16, 32]).t());
        let (rank, rest) = ours("blocks.1.mamba.x_proj.bias").view().split_at(Axis(0), 1);
        assert_eq!(rank, stored(&format!("{block}mamba_ssm_dt_rank.bias"), &[1]));
        assert_eq!(rest, stored(&format!("{block}mamba_ssm_bc_proj.bias"), &[32]));
    }

    #[test]
    fn the_pieces_are_the_whole_model() {
        for options in [options(), options().hidden_size(6), options().num_meta_tokens(0), options().hidden_size(36)] {
            let options = HymbaOptions { variant: Variant::Edifice, ..options };
            let mut covered = BTreeMap::<_, usize>::new();
            for mapping in mappings(&options) {
                let blocks = if mapping.is_of_a_block() { options.num_layers } else { 1 };
                for block in 0..blocks {
                    let ours = mapping.ours.replace("{}", &block.to_string());
                    assert_eq!(without_block(&ours), (block, mapping.ours.clone()));
                    *covered.entry(ours).or_default() += mapping.shape.iter().product::<usize>();
                }
            }
            let mut expected = BTreeMap::new();
            Hymba::zeros(options, None).visit(&mut |name, array| {
                if !array.is_empty() {
                    expected.insert(name.to_string(), array.len());
                }
            });
            assert_eq!(covered, expected);
        }
    }

    #[test]
    fn an_option_that_does_not_fit_is_named() {
        for (options, says) in [
            (HymbaOptions::edifice(7), "embed_dim is 7 in the options and seems to be 6 in the file"),
            (HymbaOptions::edifice(6), "hidden_size is 256 in the options and seems to be 8 in the file"),
            (options().state_size(4), "state_size is 4 in the options and seems to be 16 in the file"),
            (options().num_layers(1), "num_layers is 1 in the options and seems to be 2 in the file"),
            (options().num_layers(100_000), "num_layers is 100000 in the options and seems to be 2 in the file"),
            (options().num_meta_tokens(0), "num_meta_tokens is 0 in the options and seems to be 2 in the file"),
        ] {
            let error = Hymba::load_edifice(file("model.nx"), options).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn only_dropout_keys_are_ignored() {
        assert!(is_dropout_key("dropout_12.key"));
        for name in ["dropout_1.kernel", "dropout_x.key", "hymba_block_1_norm.key"] {
            assert!(!is_dropout_key(name));
        }
    }
}
