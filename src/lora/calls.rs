//! The public calls of a model with adapters.

/// `$task` is PEFT's name of what the model is for; `$setup` makes the mutable `model` of the examples.
macro_rules! lora_calls {
    ($what:ident, $task:expr, $setup:literal) => {
        /// # Low-rank adapters (LoRA)
        impl $what {
            /// Adds a new low-rank adapter beside the maps whose names fit, and activates it. It is called `default`,
            /// and replaces one of this name; for other names see [`add_lora_as`](Self::add_lora_as).
            ///
            /// From now on training changes only the active adapter, and in a [`Predictor`](crate::Predictor) the parts
            /// around the encoder; the weights themselves stay as they are, in whatever type they are stored. B is
            /// zero, so nothing changes yet; A is drawn from `seed`.
            ///
            /// # Errors
            ///
            /// [`Error::Option`](crate::Error::Option) if an option is out of range, a pattern fits no map, or the adapter does not fit
            /// into memory. Nothing is changed then.
            ///
            /// ```
            #[doc = $setup]
            /// let covered = model.add_lora(&LoraOptions::default().rank(4).maps(["in_proj", "out_proj"]), 0)?;
            /// println!("{covered}"); // how many maps, parameters, and of which maps
            /// assert!(covered.parameters > 0 && covered.maps.iter().all(|(name, _)| name.ends_with("_proj")));
            /// assert!(model.add_lora(&LoraOptions::default().maps(["no_such_map"]), 0).is_err());
            /// # Ok::<(), hymba::Error>(())
            /// ```
            pub fn add_lora(
                &mut self,
                options: &$crate::LoraOptions,
                seed: u64,
            ) -> $crate::Result<$crate::LoraCoverage> {
                self.add_lora_as($crate::lora::DEFAULT, options, seed)
            }

            /// As [`add_lora`](Self::add_lora), by a name: 1 to 64 ASCII letters, digits, `-` and `_`. A model holds up
            /// to 1024 adapters, of which at most one is active at a time.
            ///
            /// # Errors
            ///
            /// As [`add_lora`](Self::add_lora), and [`Error::Option`](crate::Error::Option) if the name has another
            /// form or the model holds 1024 adapters already.
            ///
            /// ```
            #[doc = $setup]
            /// for (seed, name) in ["french", "german"].into_iter().enumerate() {
            ///     model.add_lora_as(name, &LoraOptions::default(), seed as u64)?;
            /// }
            /// assert_eq!((model.loras(), model.lora()), (vec!["french", "german"], Some("german")));
            /// # Ok::<(), hymba::Error>(())
            /// ```
            pub fn add_lora_as(
                &mut self,
                name: &str,
                options: &$crate::LoraOptions,
                seed: u64,
            ) -> $crate::Result<$crate::LoraCoverage> {
                $crate::lora::add(self, name, options, seed)
            }

            /// Reads an adapter from a folder that the PEFT library or [`save_lora`](Self::save_lora) wrote, `adapter_config.json` and
            /// `adapter_model.safetensors`, and activates it. It is called `default`, as in [`add_lora`](Self::add_lora).
            ///
            /// Parts around the encoder of a [`Predictor`](crate::Predictor) that the folder holds, see
            /// [`save_lora`](Self::save_lora), replace those of the model.
            ///
            /// The folder need not be trusted.
            ///
            /// # Errors
            ///
            /// [`Error::Io`](crate::Error::Io) when a file cannot be read; [`Error::Format`](crate::Error::Format) when
            /// one is damaged, has no tensors of its rank for any map of this model, or says that it is another kind of
            /// adapter, such as DoRA, one that changes the weights, such as PiSSA, or one with modules that are not
            /// around the encoder of such a model; [`Error::Tensors`](crate::Error::Tensors) when it has other tensors,
            /// too, or some of other shapes; [`Error::Option`](crate::Error::Option) when it does not fit into memory.
            /// Nothing is changed then.
            ///
            /// ```
            #[doc = $setup]
            /// # let folder = tempfile::tempdir().unwrap();
            /// # let folder = folder.path();
            /// model.add_lora(&LoraOptions::default(), 0)?;
            /// model.save_lora(folder)?;
            /// model.remove_lora();
            /// model.load_lora(folder)?;
            /// assert!(model.has_lora());
            /// # Ok::<(), hymba::Error>(())
            /// ```
            pub fn load_lora(&mut self, folder: impl AsRef<std::path::Path>) -> $crate::Result<$crate::LoraCoverage> {
                self.load_lora_as($crate::lora::DEFAULT, folder)
            }

            /// As [`load_lora`](Self::load_lora), by a name as in [`add_lora_as`](Self::add_lora_as): adapters of other
            /// names stay.
            ///
            /// # Errors
            ///
            /// As [`load_lora`](Self::load_lora), and [`Error::Option`](crate::Error::Option) if the name cannot be
            /// used or the model holds 1024 adapters already.
            ///
            /// ```
            #[doc = $setup]
            /// # let folder = tempfile::tempdir().unwrap();
            /// # let folder = folder.path();
            /// model.add_lora_as("french", &LoraOptions::default(), 0)?;
            /// model.save_lora(folder)?;
            /// model.load_lora_as("german", folder)?;
            /// assert_eq!(model.loras(), ["french", "german"]);
            /// # Ok::<(), hymba::Error>(())
            /// ```
            pub fn load_lora_as(
                &mut self,
                name: &str,
                folder: impl AsRef<std::path::Path>,
            ) -> $crate::Result<$crate::LoraCoverage> {
                $crate::lora::load(self, name, folder.as_ref())
            }

            /// Writes the active adapter to a folder, which is made if there is none, as the PEFT library has them: under the names of
            /// maps in the files of this crate.
            ///
            /// Of a [`Predictor`](crate::Predictor) the folder also gets the parts around the encoder, as PEFT's
            /// `modules_to_save`: `head`, `stem`, `pooling` and `reverse.pooling`, and the normalizations, `input` and
            /// `output`.
            ///
            /// # Errors
            ///
            /// [`Error::State`](crate::Error::State) if none is active, and [`Error::Io`](crate::Error::Io) when a file cannot be written.
            ///
            /// ```
            #[doc = $setup]
            /// # let folder = tempfile::tempdir().unwrap();
            /// # let folder = folder.path();
            /// model.add_lora(&LoraOptions::default(), 0)?;
            /// model.save_lora(folder)?;
            /// assert!(folder.join("adapter_model.safetensors").exists());
            /// # Ok::<(), hymba::Error>(())
            /// ```
            pub fn save_lora(&self, folder: impl AsRef<std::path::Path>) -> $crate::Result<()> {
                $crate::lora::save(self, folder.as_ref(), $task)
            }

            /// Activates the adapter of this name, or with `None` none. That moves a pointer for each map, and copies
            /// and computes nothing. A state made with one adapter is refused while another is active, and can be used
            /// again once its own is.
            ///
            /// The parts around the encoder of a [`Predictor`](crate::Predictor) exist once, for all adapters, and stay
            /// as they are: where they were trained with each, [load](Self::load_lora_as) an adapter in place of
            /// activating it, or freeze them in training, by
            /// [`rate_for("head.*", 0.0)`](crate::train::AdamWOptions::rate_for) and so on.
            ///
            /// # Errors
            ///
            /// [`Error::Option`](crate::Error::Option) if the model holds none of this name.
            ///
            /// ```
            #[doc = $setup]
            /// model.add_lora_as("french", &LoraOptions::default(), 0)?;
            /// model.add_lora_as("german", &LoraOptions::default(), 1)?;
            /// model.set_lora("french")?;
            /// assert_eq!(model.lora(), Some("french"));
            /// model.set_lora(None)?; // the model itself
            /// assert_eq!(model.lora(), None);
            /// assert!(model.set_lora("latin").is_err());
            /// # Ok::<(), hymba::Error>(())
            /// ```
            pub fn set_lora<'n>(&mut self, name: impl Into<Option<&'n str>>) -> $crate::Result<()> {
                $crate::lora::set(self, name.into())
            }

            /// The name of the active adapter, if there is one.
            pub fn lora(&self) -> Option<&str> {
                $crate::lora::Adapted::active(self)
            }

            /// The names of all adapters that the model holds, sorted by their bytes.
            pub fn loras(&self) -> Vec<&str> {
                $crate::lora::Adapted::names(self)
            }

            /// The options of the active adapter, with the names of its maps in place of patterns.
            ///
            /// ```
            #[doc = $setup]
            /// model.add_lora(&LoraOptions::default().rank(4).maps(["in_proj"]), 0)?;
            /// let options = model.lora_options().unwrap();
            /// assert!(options.rank == 4 && options.maps[0].ends_with("0.mamba.in_proj"));
            /// # Ok::<(), hymba::Error>(())
            /// ```
            pub fn lora_options(&self) -> Option<$crate::LoraOptions> {
                $crate::lora::Adapted::options_of(self, self.lora()?)
            }

            /// Whether the model holds adapters.
            pub fn has_lora(&self) -> bool {
                !self.loras().is_empty()
            }

            /// Adds the active adapter to the weights, row by row, so that it costs nothing any more, and removes all
            /// adapters. Weights in f32 then give what the two gave apart, to rounding; narrower ones are rounded
            /// again. If none is active, the weights stay as they are. Matrices that could be trained before there were
            /// adapters can be trained again.
            ///
            /// ```
            #[doc = $setup]
            /// model.add_lora(&LoraOptions::default(), 0)?;
            /// model.merge_lora();
            /// assert!(!model.has_lora());
            /// # Ok::<(), hymba::Error>(())
            /// ```
            pub fn merge_lora(&mut self) {
                $crate::lora::Adapted::merge(self);
            }

            /// Removes all adapters: the maps are again as they were without, and matrices that could be trained then
            /// can be trained again. The parts around the encoder of a [`Predictor`](crate::Predictor) stay as they
            /// were trained or [loaded](Self::load_lora) with them.
            ///
            /// ```
            #[doc = $setup]
            /// model.add_lora(&LoraOptions::default(), 0)?;
            /// model.remove_lora();
            /// assert!(!model.has_lora());
            /// # Ok::<(), hymba::Error>(())
            /// ```
            pub fn remove_lora(&mut self) {
                $crate::lora::Adapted::remove(self, None);
            }

            /// Removes the adapter of this name; if it is the active one, none is active then.
            ///
            /// # Errors
            ///
            /// [`Error::Option`](crate::Error::Option) if the model holds none of this name.
            ///
            /// ```
            #[doc = $setup]
            /// model.add_lora_as("french", &LoraOptions::default(), 0)?;
            /// model.add_lora_as("german", &LoraOptions::default(), 1)?;
            /// model.drop_lora("french")?;
            /// assert_eq!((model.loras(), model.lora()), (vec!["german"], Some("german")));
            /// # Ok::<(), hymba::Error>(())
            /// ```
            pub fn drop_lora(&mut self, name: &str) -> $crate::Result<()> {
                $crate::lora::drop(self, name)
            }
        }
    };
}

pub(crate) use lora_calls;
