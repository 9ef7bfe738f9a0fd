//! Named processor models: what each promises, by versions, as QEMU's models of the same names do, so that a guest finds the
//! processor that it knows when it moves between the two. (`x86-64-v2` and so on are the levels of the x86-64 psABI.)

/// Who made the processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Vendor {
    Intel,
    Amd,
    Hygon,
}

impl Vendor {
    /// The twelve letters of leaf 0.
    pub(super) fn letters(self) -> &'static [u8; 12] {
        match self {
            Self::Intel => b"GenuineIntel",
            Self::Amd => b"AuthenticAMD",
            Self::Hygon => b"HygonGenuine",
        }
    }
}

/// A version of a model, numbered from 1 by its place: another name for it or none, what it changes against the version before
/// (`+feature`, `-feature`, `model=N`, `stepping=N`), and its brand where that is another one.
type Version = (&'static str, &'static str, &'static str);

/// A processor model.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) name: &'static str,
    pub(super) vendor: Vendor,
    pub(super) family: u32,
    pub(super) model: u32,
    pub(super) stepping: u32,
    /// Highest basic leaf.
    pub(super) level: u32,
    /// Highest extended leaf, or 0.
    pub(super) extended: u32,
    pub(super) brand: &'static str,
    /// Features of version 1, by name.
    pub(super) features: &'static str,
    pub(super) versions: &'static [Version],
}

/// A version of a model, looked up by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Named {
    pub(super) vendor: Vendor,
    pub(super) family: u32,
    pub(super) model: u32,
    pub(super) stepping: u32,
    pub(super) level: u32,
    pub(super) extended: u32,
    pub(super) brand: &'static str,
    pub(super) features: Vec<&'static str>,
}

/// Every name of a model or of a version of it.
pub(super) fn names() -> Vec<String> {
    let mut all = Vec::new();
    for model in MODELS {
        all.push(model.name.to_owned());
        for (index, (alias, ..)) in model.versions.iter().enumerate() {
            all.push(format!("{}-v{}", model.name, index + 1));
            if !alias.is_empty() {
                all.push((*alias).to_owned());
            }
        }
    }
    all
}

/// The model that a name means: `Haswell` (its first version), `Haswell-v4` or `Haswell-noTSX-IBRS`.
pub(super) fn named(name: &str) -> Option<Named> {
    MODELS.iter().find_map(|model| {
        let version = (1..=model.versions.len()).find(|number| {
            let (alias, ..) = model.versions[number - 1];
            name == format!("{}-v{number}", model.name)
                || name == alias && !alias.is_empty()
                || *number == 1 && name == model.name
        })?;
        Some(model.version(version))
    })
}

impl Model {
    /// What version `number` is.
    fn version(&self, number: usize) -> Named {
        let mut named = Named {
            vendor: self.vendor,
            family: self.family,
            model: self.model,
            stepping: self.stepping,
            level: self.level,
            extended: self.extended,
            brand: self.brand,
            features: self.features.split_ascii_whitespace().collect(),
        };
        for (_, changes, brand) in &self.versions[..number] {
            if !brand.is_empty() {
                named.brand = brand;
            }
            changes
                .split_ascii_whitespace()
                .for_each(|change| named.apply(change));
        }
        named
    }
}

impl Named {
    fn apply(&mut self, change: &'static str) {
        if let Some(name) = change.strip_prefix('+') {
            self.features.push(name);
        } else if let Some(name) = change.strip_prefix('-') {
            self.features.retain(|known| *known != name);
        } else if let Some((what, Ok(value))) = change
            .split_once('=')
            .map(|(what, value)| (what, value.parse()))
        {
            match what {
                "model" => self.model = value,
                _ => self.stepping = value,
            }
        }
    }

    /// Leaf 1, EAX: family, model and stepping (SDM volume 2, CPUID, figure 3-6).
    pub(super) fn signature(&self) -> u32 {
        let family = self.family.min(15) << 8 | self.family.saturating_sub(15) << 20;
        family | (self.model & 15) << 4 | self.model >> 4 << 16 | self.stepping & 15
    }
}

/// All models.
pub(super) const MODELS: &[Model] = &[
    Model {
        name: "qemu64",
        vendor: Vendor::Amd,
        family: 15,
        model: 107,
        stepping: 1,
        level: 0xd,
        extended: 0x8000_000a,
        brand: "QEMU Virtual CPU version 2.5+",
        features: "pni cx16 fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse \
                   sse2 lahf-lm svm syscall nx lm",
        versions: &[("", "", "")],
    },
    Model {
        name: "qemu32",
        vendor: Vendor::Intel,
        family: 6,
        model: 6,
        stepping: 3,
        level: 4,
        extended: 0x8000_0004,
        brand: "QEMU Virtual CPU version 2.5+",
        features: "pni fpu de pse tsc msr pae mce cx8 apic sep pge cmov pat mmx fxsr sse sse2",
        versions: &[("", "", "")],
    },
    Model {
        name: "kvm64",
        vendor: Vendor::Intel,
        family: 15,
        model: 6,
        stepping: 1,
        level: 0xd,
        extended: 0x8000_0008,
        brand: "Common KVM processor",
        features: "pni cx16 fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse \
                   sse2 syscall nx lm",
        versions: &[("", "", "")],
    },
    Model {
        name: "kvm32",
        vendor: Vendor::Intel,
        family: 15,
        model: 6,
        stepping: 1,
        level: 5,
        extended: 0x8000_0008,
        brand: "Common 32-bit KVM processor",
        features: "pni fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2",
        versions: &[("", "", "")],
    },
    Model {
        name: "486",
        vendor: Vendor::Intel,
        family: 4,
        model: 8,
        stepping: 0,
        level: 1,
        extended: 0,
        brand: "",
        features: "fpu pse",
        versions: &[("", "", "")],
    },
    Model {
        name: "pentium",
        vendor: Vendor::Intel,
        family: 5,
        model: 4,
        stepping: 3,
        level: 1,
        extended: 0,
        brand: "",
        features: "fpu de pse tsc msr mce cx8 apic mmx",
        versions: &[("", "", "")],
    },
    Model {
        name: "pentium2",
        vendor: Vendor::Intel,
        family: 6,
        model: 5,
        stepping: 2,
        level: 2,
        extended: 0,
        brand: "",
        features: "fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 mmx fxsr",
        versions: &[("", "", "")],
    },
    Model {
        name: "pentium3",
        vendor: Vendor::Intel,
        family: 6,
        model: 7,
        stepping: 3,
        level: 3,
        extended: 0,
        brand: "",
        features: "fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 mmx fxsr sse",
        versions: &[("", "", "")],
    },
    Model {
        name: "athlon",
        vendor: Vendor::Amd,
        family: 6,
        model: 2,
        stepping: 3,
        level: 2,
        extended: 0x8000_0008,
        brand: "QEMU Virtual CPU version 2.5+",
        features: "fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 mmx fxsr sse sse2 mmxext \
                   3dnowext 3dnow",
        versions: &[("", "", "")],
    },
    Model {
        name: "phenom",
        vendor: Vendor::Amd,
        family: 16,
        model: 2,
        stepping: 3,
        level: 5,
        extended: 0x8000_001a,
        brand: "AMD Phenom(tm) 9550 Quad-Core Processor",
        features: "pni monitor cx16 popcnt fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush \
                   mmx fxsr sse sse2 lahf-lm svm abm sse4a syscall nx mmxext fxsr-opt pdpe1gb rdtscp lm 3dnowext 3dnow \
                   npt",
        versions: &[("", "", "")],
    },
    Model {
        name: "n270",
        vendor: Vendor::Intel,
        family: 6,
        model: 28,
        stepping: 2,
        level: 0xa,
        extended: 0x8000_0008,
        brand: "Intel(R) Atom(TM) CPU N270   @ 1.60GHz",
        features: "pni monitor ssse3 movbe fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat clflush acpi \
                   mmx fxsr sse sse2 ss lahf-lm nx",
        versions: &[("", "", "")],
    },
    Model {
        name: "coreduo",
        vendor: Vendor::Intel,
        family: 6,
        model: 14,
        stepping: 8,
        level: 0xa,
        extended: 0x8000_0008,
        brand: "Genuine Intel(R) CPU           T2600  @ 2.16GHz",
        features: "pni monitor fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat clflush acpi mmx fxsr sse \
                   sse2 ss nx",
        versions: &[("", "", "")],
    },
    Model {
        name: "core2duo",
        vendor: Vendor::Intel,
        family: 6,
        model: 15,
        stepping: 11,
        level: 0xa,
        extended: 0x8000_0008,
        brand: "Intel(R) Core(TM)2 Duo CPU     T7700  @ 2.40GHz",
        features: "pni monitor ssse3 cx16 fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush \
                   acpi mmx fxsr sse sse2 ss lahf-lm syscall nx lm",
        versions: &[("", "", "")],
    },
    Model {
        name: "Conroe",
        vendor: Vendor::Intel,
        family: 6,
        model: 15,
        stepping: 3,
        level: 0xa,
        extended: 0x8000_0008,
        brand: "Intel Celeron_4x0 (Conroe/Merom Class Core 2)",
        features: "pni ssse3 fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse \
                   sse2 lahf-lm syscall nx lm",
        versions: &[("", "", "")],
    },
    Model {
        name: "Penryn",
        vendor: Vendor::Intel,
        family: 6,
        model: 23,
        stepping: 3,
        level: 0xa,
        extended: 0x8000_0008,
        brand: "Intel Core 2 Duo P9xxx (Penryn Class Core 2)",
        features: "pni ssse3 cx16 sse4.1 fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush \
                   mmx fxsr sse sse2 lahf-lm syscall nx lm",
        versions: &[("", "", "")],
    },
    Model {
        name: "Nehalem",
        vendor: Vendor::Intel,
        family: 6,
        model: 26,
        stepping: 3,
        level: 0xb,
        extended: 0x8000_0008,
        brand: "Intel Core i7 9xx (Nehalem Class Core i7)",
        features: "pni ssse3 cx16 sse4.1 sse4.2 popcnt fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat \
                   pse36 clflush mmx fxsr sse sse2 lahf-lm syscall nx lm",
        versions: &[
            ("", "", ""),
            (
                "Nehalem-IBRS",
                "+spec-ctrl",
                "Intel Core i7 9xx (Nehalem Core i7, IBRS update)",
            ),
        ],
    },
    Model {
        name: "Westmere",
        vendor: Vendor::Intel,
        family: 6,
        model: 44,
        stepping: 1,
        level: 0xb,
        extended: 0x8000_0008,
        brand: "Westmere E56xx/L56xx/X56xx (Nehalem-C)",
        features: "pni pclmulqdq ssse3 cx16 sse4.1 sse4.2 popcnt aes fpu de pse tsc msr pae mce cx8 apic sep mtrr pge \
                   mca cmov pat pse36 clflush mmx fxsr sse sse2 arat lahf-lm syscall nx lm",
        versions: &[
            ("", "", ""),
            (
                "Westmere-IBRS",
                "+spec-ctrl",
                "Westmere E56xx/L56xx/X56xx (IBRS update)",
            ),
        ],
    },
    Model {
        name: "SandyBridge",
        vendor: Vendor::Intel,
        family: 6,
        model: 42,
        stepping: 1,
        level: 0xd,
        extended: 0x8000_0008,
        brand: "Intel Xeon E312xx (Sandy Bridge)",
        features: "pni pclmulqdq ssse3 cx16 sse4.1 sse4.2 popcnt tsc-deadline aes xsave avx fpu de pse tsc msr pae mce \
                   cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 arat xsaveopt lahf-lm syscall nx \
                   rdtscp lm",
        versions: &[
            ("", "", ""),
            (
                "SandyBridge-IBRS",
                "+spec-ctrl",
                "Intel Xeon E312xx (Sandy Bridge, IBRS update)",
            ),
        ],
    },
    Model {
        name: "IvyBridge",
        vendor: Vendor::Intel,
        family: 6,
        model: 58,
        stepping: 9,
        level: 0xd,
        extended: 0x8000_0008,
        brand: "Intel Xeon E3-12xx v2 (Ivy Bridge)",
        features: "pni pclmulqdq ssse3 cx16 sse4.1 sse4.2 popcnt tsc-deadline aes xsave avx f16c rdrand fpu de pse tsc \
                   msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 arat fsgsbase smep \
                   erms xsaveopt lahf-lm syscall nx rdtscp lm",
        versions: &[
            ("", "", ""),
            (
                "IvyBridge-IBRS",
                "+spec-ctrl",
                "Intel Xeon E3-12xx v2 (Ivy Bridge, IBRS)",
            ),
        ],
    },
    Model {
        name: "Haswell",
        vendor: Vendor::Intel,
        family: 6,
        model: 60,
        stepping: 4,
        level: 0xd,
        extended: 0x8000_0008,
        brand: "Intel Core Processor (Haswell)",
        features: "pni pclmulqdq ssse3 fma cx16 pcid sse4.1 sse4.2 movbe popcnt tsc-deadline aes xsave avx f16c rdrand \
                   fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 arat \
                   fsgsbase bmi1 hle avx2 smep bmi2 erms invpcid rtm xsaveopt lahf-lm abm syscall nx rdtscp lm",
        versions: &[
            ("", "", ""),
            (
                "Haswell-noTSX",
                "-hle -rtm stepping=1",
                "Intel Core Processor (Haswell, no TSX)",
            ),
            (
                "Haswell-IBRS",
                "+hle +rtm +spec-ctrl stepping=4",
                "Intel Core Processor (Haswell, IBRS)",
            ),
            (
                "Haswell-noTSX-IBRS",
                "-hle -rtm stepping=1",
                "Intel Core Processor (Haswell, no TSX, IBRS)",
            ),
        ],
    },
    Model {
        name: "Broadwell",
        vendor: Vendor::Intel,
        family: 6,
        model: 61,
        stepping: 2,
        level: 0xd,
        extended: 0x8000_0008,
        brand: "Intel Core Processor (Broadwell)",
        features: "pni pclmulqdq ssse3 fma cx16 pcid sse4.1 sse4.2 movbe popcnt tsc-deadline aes xsave avx f16c rdrand \
                   fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 arat \
                   fsgsbase bmi1 hle avx2 smep bmi2 erms invpcid rtm rdseed adx smap xsaveopt lahf-lm abm 3dnowprefetch \
                   syscall nx rdtscp lm",
        versions: &[
            ("", "", ""),
            (
                "Broadwell-noTSX",
                "-hle -rtm",
                "Intel Core Processor (Broadwell, no TSX)",
            ),
            (
                "Broadwell-IBRS",
                "+hle +rtm +spec-ctrl",
                "Intel Core Processor (Broadwell, IBRS)",
            ),
            (
                "Broadwell-noTSX-IBRS",
                "-hle -rtm",
                "Intel Core Processor (Broadwell, no TSX, IBRS)",
            ),
        ],
    },
    Model {
        name: "Skylake-Client",
        vendor: Vendor::Intel,
        family: 6,
        model: 94,
        stepping: 3,
        level: 0xd,
        extended: 0x8000_0008,
        brand: "Intel Core Processor (Skylake)",
        features: "pni pclmulqdq ssse3 fma cx16 pcid sse4.1 sse4.2 movbe popcnt tsc-deadline aes xsave avx f16c rdrand \
                   fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 arat \
                   fsgsbase bmi1 hle avx2 smep bmi2 erms invpcid rtm rdseed adx smap xsaveopt xsavec xgetbv1 lahf-lm \
                   abm 3dnowprefetch syscall nx rdtscp lm",
        versions: &[
            ("", "", ""),
            (
                "Skylake-Client-IBRS",
                "+spec-ctrl",
                "Intel Core Processor (Skylake, IBRS)",
            ),
            (
                "Skylake-Client-noTSX-IBRS",
                "-hle -rtm",
                "Intel Core Processor (Skylake, IBRS, no TSX)",
            ),
            ("", "+xsaves", ""),
        ],
    },
    Model {
        name: "Skylake-Server",
        vendor: Vendor::Intel,
        family: 6,
        model: 85,
        stepping: 4,
        level: 0xd,
        extended: 0x8000_0008,
        brand: "Intel Xeon Processor (Skylake)",
        features: "pni pclmulqdq ssse3 fma cx16 pcid sse4.1 sse4.2 movbe popcnt tsc-deadline aes xsave avx f16c rdrand \
                   fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 arat \
                   fsgsbase bmi1 hle avx2 smep bmi2 erms invpcid rtm avx512f avx512dq rdseed adx smap clflushopt clwb \
                   avx512cd avx512bw avx512vl pku xsaveopt xsavec xgetbv1 lahf-lm abm 3dnowprefetch syscall nx pdpe1gb \
                   rdtscp lm",
        versions: &[
            ("", "", ""),
            (
                "Skylake-Server-IBRS",
                "-clflushopt +spec-ctrl",
                "Intel Xeon Processor (Skylake, IBRS)",
            ),
            (
                "Skylake-Server-noTSX-IBRS",
                "-hle -rtm",
                "Intel Xeon Processor (Skylake, IBRS, no TSX)",
            ),
            ("", "", ""),
            ("", "+xsaves", ""),
        ],
    },
    Model {
        name: "Cascadelake-Server",
        vendor: Vendor::Intel,
        family: 6,
        model: 85,
        stepping: 6,
        level: 0xd,
        extended: 0x8000_0008,
        brand: "Intel Xeon Processor (Cascadelake)",
        features: "pni pclmulqdq ssse3 fma cx16 pcid sse4.1 sse4.2 movbe popcnt tsc-deadline aes xsave avx f16c rdrand \
                   fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 arat \
                   fsgsbase bmi1 hle avx2 smep bmi2 erms invpcid rtm avx512f avx512dq rdseed adx smap clflushopt clwb \
                   avx512cd avx512bw avx512vl pku avx512vnni spec-ctrl ssbd xsaveopt xsavec xgetbv1 lahf-lm abm \
                   3dnowprefetch syscall nx pdpe1gb rdtscp lm",
        versions: &[
            ("", "", ""),
            (
                "",
                "+arch-capabilities +rdctl-no +ibrs-all +skip-l1dfl-vmentry +mds-no",
                "",
            ),
            ("Cascadelake-Server-noTSX", "-hle -rtm", ""),
            ("", "", ""),
            ("", "+xsaves", ""),
        ],
    },
    Model {
        name: "Cooperlake",
        vendor: Vendor::Intel,
        family: 6,
        model: 85,
        stepping: 10,
        level: 0xd,
        extended: 0x8000_0008,
        brand: "Intel Xeon Processor (Cooperlake)",
        features: "pni pclmulqdq ssse3 fma cx16 pcid sse4.1 sse4.2 movbe popcnt tsc-deadline aes xsave avx f16c rdrand \
                   fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 arat \
                   fsgsbase bmi1 hle avx2 smep bmi2 erms invpcid rtm avx512f avx512dq rdseed adx smap clflushopt clwb \
                   avx512cd avx512bw avx512vl pku avx512vnni spec-ctrl stibp arch-capabilities ssbd avx512-bf16 \
                   xsaveopt xsavec xgetbv1 lahf-lm abm 3dnowprefetch syscall nx pdpe1gb rdtscp lm rdctl-no ibrs-all \
                   skip-l1dfl-vmentry mds-no pschange-mc-no taa-no",
        versions: &[("", "", ""), ("", "+xsaves", "")],
    },
    Model {
        name: "Icelake-Server",
        vendor: Vendor::Intel,
        family: 6,
        model: 134,
        stepping: 0,
        level: 0xd,
        extended: 0x8000_0008,
        brand: "Intel Xeon Processor (Icelake)",
        features: "pni pclmulqdq ssse3 fma cx16 pcid sse4.1 sse4.2 movbe popcnt tsc-deadline aes xsave avx f16c rdrand \
                   fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 arat \
                   fsgsbase bmi1 hle avx2 smep bmi2 erms invpcid rtm avx512f avx512dq rdseed adx smap clflushopt clwb \
                   avx512cd avx512bw avx512vl avx512vbmi umip pku avx512vbmi2 gfni vaes vpclmulqdq avx512vnni \
                   avx512bitalg avx512-vpopcntdq la57 spec-ctrl ssbd xsaveopt xsavec xgetbv1 lahf-lm abm 3dnowprefetch \
                   syscall nx pdpe1gb rdtscp lm wbnoinvd",
        versions: &[
            ("", "", ""),
            ("Icelake-Server-noTSX", "-hle -rtm", ""),
            (
                "",
                "+arch-capabilities +rdctl-no +ibrs-all +skip-l1dfl-vmentry +mds-no +pschange-mc-no +taa-no",
                "",
            ),
            ("", "+avx512ifma +sha-ni +rdpid +fsrm model=106", ""),
            ("", "+xsaves", ""),
            ("", "", ""),
        ],
    },
    Model {
        name: "Denverton",
        vendor: Vendor::Intel,
        family: 6,
        model: 95,
        stepping: 1,
        level: 0x15,
        extended: 0x8000_0008,
        brand: "Intel Atom Processor (Denverton)",
        features: "pni pclmulqdq monitor ssse3 cx16 sse4.1 sse4.2 movbe popcnt tsc-deadline aes xsave rdrand fpu de pse \
                   tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 arat fsgsbase \
                   smep erms mpx rdseed smap clflushopt sha-ni spec-ctrl arch-capabilities ssbd xsaveopt xsavec xgetbv1 \
                   lahf-lm 3dnowprefetch syscall nx pdpe1gb rdtscp lm rdctl-no skip-l1dfl-vmentry",
        versions: &[("", "", ""), ("", "-monitor -mpx", ""), ("", "+xsaves", "")],
    },
    Model {
        name: "Snowridge",
        vendor: Vendor::Intel,
        family: 6,
        model: 134,
        stepping: 1,
        level: 0x1b,
        extended: 0x8000_0008,
        brand: "Intel Atom Processor (SnowRidge)",
        features: "pni pclmulqdq monitor ssse3 cx16 sse4.1 sse4.2 movbe popcnt tsc-deadline aes xsave rdrand fpu de pse \
                   tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 arat fsgsbase \
                   smep erms mpx rdseed smap clflushopt clwb sha-ni umip gfni cldemote movdiri movdir64b spec-ctrl \
                   arch-capabilities core-capability ssbd xsaveopt xsavec xgetbv1 lahf-lm 3dnowprefetch syscall nx \
                   pdpe1gb rdtscp lm split-lock-detect",
        versions: &[
            ("", "", ""),
            ("", "-mpx", "Intel Atom Processor (Snowridge, no MPX)"),
            ("", "+xsaves", ""),
            ("", "-core-capability -split-lock-detect", ""),
        ],
    },
    Model {
        name: "KnightsMill",
        vendor: Vendor::Intel,
        family: 6,
        model: 133,
        stepping: 0,
        level: 0xd,
        extended: 0x8000_0008,
        brand: "Intel Xeon Phi Processor (Knights Mill)",
        features: "pni pclmulqdq ssse3 fma cx16 sse4.1 sse4.2 movbe popcnt tsc-deadline aes xsave avx f16c rdrand fpu \
                   de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 ss arat \
                   fsgsbase bmi1 avx2 smep bmi2 erms avx512f rdseed adx avx512pf avx512er avx512cd avx512-vpopcntdq \
                   avx512-4vnniw avx512-4fmaps xsaveopt lahf-lm abm 3dnowprefetch syscall nx pdpe1gb rdtscp lm",
        versions: &[("", "", "")],
    },
    Model {
        name: "Opteron_G1",
        vendor: Vendor::Amd,
        family: 15,
        model: 6,
        stepping: 1,
        level: 5,
        extended: 0x8000_0008,
        brand: "AMD Opteron 240 (Gen 1 Class Opteron)",
        features: "pni fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 \
                   syscall nx lm",
        versions: &[("", "", "")],
    },
    Model {
        name: "Opteron_G2",
        vendor: Vendor::Amd,
        family: 15,
        model: 6,
        stepping: 1,
        level: 5,
        extended: 0x8000_000a,
        brand: "AMD Opteron 22xx (Gen 2 Class Opteron)",
        features: "pni cx16 fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse \
                   sse2 lahf-lm svm syscall nx lm",
        versions: &[("", "", "")],
    },
    Model {
        name: "Opteron_G3",
        vendor: Vendor::Amd,
        family: 16,
        model: 2,
        stepping: 3,
        level: 5,
        extended: 0x8000_000a,
        brand: "AMD Opteron 23xx (Gen 3 Class Opteron)",
        features: "pni monitor cx16 popcnt fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush \
                   mmx fxsr sse sse2 lahf-lm svm abm sse4a misalignsse syscall nx rdtscp lm",
        versions: &[("", "", "")],
    },
    Model {
        name: "Opteron_G4",
        vendor: Vendor::Amd,
        family: 21,
        model: 1,
        stepping: 2,
        level: 0xd,
        extended: 0x8000_001a,
        brand: "AMD Opteron 62xx class CPU",
        features: "pni pclmulqdq ssse3 cx16 sse4.1 sse4.2 popcnt aes xsave avx fpu de pse tsc msr pae mce cx8 apic sep \
                   mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 lahf-lm svm abm sse4a misalignsse \
                   3dnowprefetch xop fma4 syscall nx pdpe1gb rdtscp lm npt nrip-save",
        versions: &[("", "", "")],
    },
    Model {
        name: "Opteron_G5",
        vendor: Vendor::Amd,
        family: 21,
        model: 2,
        stepping: 0,
        level: 0xd,
        extended: 0x8000_001a,
        brand: "AMD Opteron 63xx class CPU",
        features: "pni pclmulqdq ssse3 fma cx16 sse4.1 sse4.2 popcnt aes xsave avx f16c fpu de pse tsc msr pae mce cx8 \
                   apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 lahf-lm svm abm sse4a misalignsse \
                   3dnowprefetch xop fma4 tbm syscall nx pdpe1gb rdtscp lm npt nrip-save",
        versions: &[("", "", "")],
    },
    Model {
        name: "EPYC",
        vendor: Vendor::Amd,
        family: 23,
        model: 1,
        stepping: 2,
        level: 0xd,
        extended: 0x8000_001e,
        brand: "AMD EPYC Processor",
        features: "pni pclmulqdq monitor ssse3 fma cx16 sse4.1 sse4.2 movbe popcnt aes xsave avx f16c rdrand fpu de pse \
                   tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 arat fsgsbase \
                   bmi1 avx2 smep bmi2 rdseed adx smap clflushopt sha-ni xsaveopt xsavec xgetbv1 lahf-lm svm cr8legacy \
                   abm sse4a misalignsse 3dnowprefetch osvw topoext syscall nx mmxext fxsr-opt pdpe1gb rdtscp lm npt \
                   nrip-save",
        versions: &[
            ("", "", ""),
            ("EPYC-IBPB", "+ibpb", "AMD EPYC Processor (with IBPB)"),
            (
                "",
                "+xsaves +perfctr-core +clzero +xsaveerptr",
                "AMD EPYC Processor",
            ),
        ],
    },
    Model {
        name: "EPYC-Rome",
        vendor: Vendor::Amd,
        family: 23,
        model: 49,
        stepping: 0,
        level: 0xd,
        extended: 0x8000_001e,
        brand: "AMD EPYC-Rome Processor",
        features: "pni pclmulqdq monitor ssse3 fma cx16 sse4.1 sse4.2 movbe popcnt aes xsave avx f16c rdrand fpu de pse \
                   tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 arat fsgsbase \
                   bmi1 avx2 smep bmi2 rdseed adx smap clflushopt clwb sha-ni umip rdpid xsaveopt xsavec xgetbv1 xsaves \
                   lahf-lm svm cr8legacy abm sse4a misalignsse 3dnowprefetch osvw topoext perfctr-core syscall nx \
                   mmxext fxsr-opt pdpe1gb rdtscp lm clzero xsaveerptr wbnoinvd ibpb amd-stibp npt nrip-save",
        versions: &[("", "", ""), ("", "+ibrs +amd-ssbd", "")],
    },
    Model {
        name: "EPYC-Milan",
        vendor: Vendor::Amd,
        family: 25,
        model: 1,
        stepping: 1,
        level: 0xd,
        extended: 0x8000_001e,
        brand: "AMD EPYC-Milan Processor",
        features: "pni pclmulqdq monitor ssse3 fma cx16 pcid sse4.1 sse4.2 movbe popcnt aes xsave avx f16c rdrand fpu \
                   de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 arat \
                   fsgsbase bmi1 avx2 smep bmi2 erms invpcid rdseed adx smap clflushopt clwb sha-ni umip pku rdpid fsrm \
                   xsaveopt xsavec xgetbv1 xsaves lahf-lm svm cr8legacy abm sse4a misalignsse 3dnowprefetch osvw \
                   topoext perfctr-core syscall nx mmxext fxsr-opt pdpe1gb rdtscp lm clzero xsaveerptr wbnoinvd ibpb \
                   ibrs amd-stibp amd-ssbd npt nrip-save svme-addr-chk",
        versions: &[("", "", "")],
    },
    Model {
        name: "Dhyana",
        vendor: Vendor::Hygon,
        family: 24,
        model: 0,
        stepping: 1,
        level: 0xd,
        extended: 0x8000_001e,
        brand: "Hygon Dhyana Processor",
        features: "pni monitor ssse3 fma cx16 sse4.1 sse4.2 movbe popcnt xsave avx f16c rdrand fpu de pse tsc msr pae \
                   mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 arat fsgsbase bmi1 avx2 smep \
                   bmi2 rdseed adx smap clflushopt xsaveopt xsavec xgetbv1 lahf-lm svm cr8legacy abm sse4a misalignsse \
                   3dnowprefetch osvw topoext syscall nx mmxext fxsr-opt pdpe1gb rdtscp lm ibpb npt nrip-save",
        versions: &[("", "", ""), ("", "+xsaves", "")],
    },
    Model {
        name: "x86-64-v2",
        vendor: Vendor::Intel,
        family: 15,
        model: 6,
        stepping: 1,
        level: 0xd,
        extended: 0x8000_0008,
        brand: "x86-64-v2 Processor",
        features: "pni ssse3 cx16 sse4.1 sse4.2 popcnt fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat \
                   pse36 clflush mmx fxsr sse sse2 lahf-lm syscall nx lm",
        versions: &[("", "", "")],
    },
    Model {
        name: "x86-64-v2-AES",
        vendor: Vendor::Intel,
        family: 15,
        model: 6,
        stepping: 1,
        level: 0xd,
        extended: 0x8000_0008,
        brand: "x86-64-v2 Processor with AES",
        features: "pni pclmulqdq ssse3 cx16 sse4.1 sse4.2 popcnt aes fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca \
                   cmov pat pse36 clflush mmx fxsr sse sse2 lahf-lm syscall nx lm",
        versions: &[("", "", "")],
    },
    Model {
        name: "x86-64-v3",
        vendor: Vendor::Intel,
        family: 15,
        model: 6,
        stepping: 1,
        level: 0xd,
        extended: 0x8000_0008,
        brand: "x86-64-v3 Processor",
        features: "pni pclmulqdq ssse3 fma cx16 sse4.1 sse4.2 movbe popcnt aes xsave avx f16c fpu de pse tsc msr pae mce \
                   cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 bmi1 avx2 bmi2 xsaveopt lahf-lm abm \
                   syscall nx lm",
        versions: &[("", "", "")],
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_build_on_one_another() {
        let first = named("Haswell").unwrap();
        assert_eq!(named("Haswell-v1"), Some(first.clone()));
        assert!(first.features.contains(&"rtm"));
        let fourth = named("Haswell-noTSX-IBRS").unwrap();
        assert_eq!(named("Haswell-v4"), Some(fourth.clone()));
        assert!(!fourth.features.contains(&"rtm") && fourth.features.contains(&"spec-ctrl"));
        assert_eq!((first.stepping, fourth.stepping), (4, 1));
        assert_eq!(named("Haswell-v5"), None);
        assert_eq!(named("haswell"), None);
        assert_eq!(first.signature(), 0x0003_06c4);
        assert_eq!(named("Opteron_G5").unwrap().signature(), 0x0060_0f20);
    }

    #[test]
    fn every_feature_has_a_name_that_is_known() {
        for name in names() {
            for feature in named(&name).unwrap().features {
                assert!(
                    super::super::features::Features::named(feature).is_some(),
                    "{name}: {feature}"
                );
            }
        }
    }
}
