//! What a stranger's template must not contain.
//!
//! minijinja bounds by its fuel the instructions that run and the bytes of text they make. It does not bound what lists can
//! become: `[a, a]` and `a + a` double for the price of one instruction, a list in a list in a list overflows the stack when
//! it is dropped, and so do long expressions when they are compiled. So a template may take lists apart, but not put them
//! together, and a namespace may remember texts and numbers.

use std::collections::BTreeMap;

use minijinja::machinery::ast::{BinOpKind, Call, CallArg, Expr, Stmt};
use minijinja::machinery::{Token, parse, tokenize};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::ValueKind;

/// Longest template in bytes. The longest of published chat models have 30 thousand.
const MAX_TEMPLATE: usize = 1 << 16;
/// Most words and signs between `{{` and `}}`, or `{%` and `%}`.
const MAX_TOKENS: usize = 512;
/// Most `elif` in a template, which are nested in one another, and most slices, which may be.
const MAX_ELIFS: usize = 64;
const MAX_SLICES: usize = 64;

/// Filters that give a text, a number or a truth.
const SCALAR_FILTERS: [&str; 17] = [
    "abs",
    "bool",
    "capitalize",
    "count",
    "e",
    "escape",
    "indent",
    "join",
    "length",
    "lower",
    "replace",
    "round",
    "string",
    "title",
    "tojson",
    "trim",
    "upper",
];
/// Methods of texts that do.
const SCALAR_METHODS: [&str; 13] = [
    "capitalize",
    "count",
    "endswith",
    "find",
    "join",
    "lower",
    "lstrip",
    "replace",
    "rstrip",
    "startswith",
    "strip",
    "title",
    "upper",
];

/// What every template is given as a text or a truth.
const SCALARS: [&str; 5] = ["add_generation_prompt", "bos_token", "eos_token", "pad_token", "unk_token"];

/// The error is the reason why a template is not run.
pub(super) fn check(source: &str, syntax: &SyntaxConfig) -> Result<(), String> {
    if source.len() > MAX_TEMPLATE {
        return Err(format!("it has {} bytes, and at most {MAX_TEMPLATE} are read", source.len()));
    }
    check_length(source, syntax)?;
    let template = parse(source, "template", syntax.clone()).map_err(|error| error.to_string())?;
    let mut walk = Walk { names: SCALARS.map(|name| (name, true)).into(), slices: 0 };
    walk.name_statement(&template);
    walk.statement(&template)
}

/// Before anything is parsed: parsing and compiling recurse.
fn check_length(source: &str, syntax: &SyntaxConfig) -> Result<(), String> {
    let (mut tokens, mut elifs) = (0, 0);
    for token in tokenize(source, false, syntax.clone()) {
        let (token, span) = token.map_err(|error| error.to_string())?;
        match token {
            Token::TemplateData(_) | Token::VariableStart | Token::BlockStart => tokens = 0,
            Token::Ident("elif") => elifs += 1,
            _ => {}
        }
        tokens += 1;
        if tokens > MAX_TOKENS {
            return Err(format!("line {}: more than {MAX_TOKENS} words and signs in one tag", span.start_line));
        }
        if elifs > MAX_ELIFS {
            return Err(format!("line {}: more than {MAX_ELIFS} elif", span.start_line));
        }
    }
    Ok(())
}

/// A walk over the parsed template.
struct Walk<'a> {
    /// Variables, and whether each is a text, a number or a truth wherever it is set.
    names: BTreeMap<&'a str, bool>,
    slices: usize,
}

type Checked = Result<(), String>;

impl<'a> Walk<'a> {
    fn name(&mut self, target: &Expr<'a>, scalar: bool) {
        match target {
            Expr::Var(name) => {
                let before = self.names.get(name.id).copied().unwrap_or(true);
                self.names.insert(name.id, before && scalar);
            }
            Expr::List(list) => list.items.iter().for_each(|item| self.name(item, false)),
            Expr::Tuple(tuple) => tuple.items.iter().for_each(|item| self.name(item, false)),
            _ => {}
        }
    }

    fn name_statements(&mut self, statements: &[Stmt<'a>]) {
        statements.iter().for_each(|statement| self.name_statement(statement));
    }

    /// Finds what the variables are. Those that are set from other variables are taken for lists.
    fn name_statement(&mut self, statement: &Stmt<'a>) {
        match statement {
            Stmt::Template(node) => self.name_statements(&node.children),
            Stmt::ForLoop(node) => {
                self.name(&node.target, false);
                self.name_statements(&node.body);
                self.name_statements(&node.else_body);
            }
            Stmt::IfCond(node) => {
                self.name_statements(&node.true_body);
                self.name_statements(&node.false_body);
            }
            Stmt::WithBlock(node) => {
                node.assignments.iter().for_each(|(target, _)| self.name(target, false));
                self.name_statements(&node.body);
            }
            Stmt::Set(node) => {
                let scalar = scalar(&node.expr, &BTreeMap::new());
                self.name(&node.target, scalar);
            }
            Stmt::SetBlock(node) => {
                self.name(&node.target, node.filter.is_none());
                self.name_statements(&node.body);
            }
            Stmt::AutoEscape(node) => self.name_statements(&node.body),
            Stmt::FilterBlock(node) => self.name_statements(&node.body),
            Stmt::Macro(node) => {
                node.args.iter().for_each(|argument| self.name(argument, false));
                self.name_statements(&node.body);
            }
            Stmt::CallBlock(node) => {
                node.macro_decl.args.iter().for_each(|argument| self.name(argument, false));
                self.name_statements(&node.macro_decl.body);
            }
            Stmt::EmitExpr(_) | Stmt::EmitRaw(_) | Stmt::Continue(_) | Stmt::Break(_) | Stmt::Do(_) => {}
        }
    }

    fn statements(&mut self, statements: &[Stmt<'a>]) -> Checked {
        statements.iter().try_for_each(|statement| self.statement(statement))
    }

    fn statement(&mut self, statement: &Stmt<'a>) -> Checked {
        match statement {
            Stmt::Template(node) => self.statements(&node.children),
            Stmt::EmitExpr(node) => self.expression(&node.expr),
            Stmt::EmitRaw(_) | Stmt::Continue(_) | Stmt::Break(_) => Ok(()),
            Stmt::ForLoop(node) => {
                self.expression(&node.iter)?;
                self.optional(node.filter_expr.as_ref())?;
                self.statements(&node.body)?;
                self.statements(&node.else_body)
            }
            Stmt::IfCond(node) => {
                self.expression(&node.expr)?;
                self.statements(&node.true_body)?;
                self.statements(&node.false_body)
            }
            Stmt::WithBlock(node) => {
                node.assignments.iter().try_for_each(|(_, expr)| self.expression(expr))?;
                self.statements(&node.body)
            }
            Stmt::Set(node) => {
                self.expression(&node.expr)?;
                if let Expr::GetAttr(target) = &node.target {
                    self.expression(&target.expr)?;
                    let part = matches!(node.expr, Expr::GetAttr(_) | Expr::GetItem(_));
                    if !part && !scalar(&node.expr, &self.names) {
                        return refuse(&node.expr, "a namespace can be set to a text, a number or a part of something");
                    }
                }
                Ok(())
            }
            Stmt::SetBlock(node) => {
                if let (Expr::GetAttr(_), Some(filter)) = (&node.target, &node.filter) {
                    return refuse(filter, "a namespace cannot be set to a filtered block");
                }
                self.optional(node.filter.as_ref())?;
                self.statements(&node.body)
            }
            Stmt::AutoEscape(node) => {
                self.expression(&node.enabled)?;
                self.statements(&node.body)
            }
            Stmt::FilterBlock(node) => {
                self.expression(&node.filter)?;
                self.statements(&node.body)
            }
            Stmt::Macro(node) => {
                node.defaults.iter().try_for_each(|default| self.expression(default))?;
                self.statements(&node.body)
            }
            Stmt::CallBlock(node) => {
                self.call(&node.call)?;
                node.macro_decl.defaults.iter().try_for_each(|default| self.expression(default))?;
                self.statements(&node.macro_decl.body)
            }
            Stmt::Do(node) => self.call(&node.call),
        }
    }

    fn optional(&mut self, expression: Option<&Expr<'a>>) -> Checked {
        expression.map_or(Ok(()), |expression| self.expression(expression))
    }

    fn expression(&mut self, expression: &Expr<'a>) -> Checked {
        match expression {
            Expr::Var(_) | Expr::Const(_) => Ok(()),
            Expr::List(_) | Expr::Tuple(_) | Expr::Map(_) if expression.as_const().is_some() => Ok(()),
            Expr::List(_) | Expr::Tuple(_) | Expr::Map(_) => {
                refuse(expression, "a list or dict can hold only texts, numbers, true, false and none, written out")
            }
            Expr::Slice(node) => {
                self.slices += 1;
                if self.slices > MAX_SLICES {
                    return refuse(expression, &format!("more than {MAX_SLICES} slices"));
                }
                self.expression(&node.expr)?;
                [&node.start, &node.stop, &node.step].into_iter().try_for_each(|part| self.optional(part.as_ref()))
            }
            Expr::UnaryOp(node) => self.expression(&node.expr),
            Expr::BinOp(node) => {
                self.expression(&node.left)?;
                self.expression(&node.right)?;
                let (left, right) = (scalar(&node.left, &self.names), scalar(&node.right, &self.names));
                match node.op {
                    BinOpKind::Add if !left && !right => {
                        refuse(expression, "+ is for texts and numbers, and these may be lists: join texts with ~")
                    }
                    BinOpKind::Mul if !left || !right => {
                        refuse(expression, "* is for texts and numbers, and one of these may be a list")
                    }
                    _ => Ok(()),
                }
            }
            Expr::Compare(node) => {
                self.expression(&node.expr)?;
                node.ops.iter().try_for_each(|op| self.expression(&op.expr))
            }
            Expr::IfExpr(node) => {
                self.expression(&node.test_expr)?;
                self.expression(&node.true_expr)?;
                self.optional(node.false_expr.as_ref())
            }
            Expr::Filter(node) => {
                self.optional(node.expr.as_ref())?;
                self.arguments(&node.args)
            }
            Expr::Test(node) => {
                self.expression(&node.expr)?;
                self.arguments(&node.args)
            }
            Expr::GetAttr(node) => self.expression(&node.expr),
            Expr::GetItem(node) => {
                self.expression(&node.expr)?;
                self.expression(&node.subscript_expr)
            }
            Expr::Call(node) => self.call(node),
        }
    }

    fn call(&mut self, call: &Call<'a>) -> Checked {
        self.expression(&call.expr)?;
        self.arguments(&call.args)
    }

    fn arguments(&mut self, arguments: &[CallArg<'a>]) -> Checked {
        arguments.iter().try_for_each(|argument| self.expression(argument_of(argument)))
    }
}

fn argument_of<'e, 'a>(argument: &'e CallArg<'a>) -> &'e Expr<'a> {
    match argument {
        CallArg::Pos(expr) | CallArg::Kwarg(_, expr) | CallArg::PosSplat(expr) | CallArg::KwargSplat(expr) => expr,
    }
}

fn refuse(expression: &Expr, reason: &str) -> Checked {
    Err(format!("line {}: {reason}", expression.span().start_line))
}

/// Whether the value is a text, a number or a truth for certain, or else an error.
fn scalar(expression: &Expr, names: &BTreeMap<&str, bool>) -> bool {
    let scalar = |expression: &Expr| self::scalar(expression, names);
    match expression {
        Expr::Const(node) => !matches!(node.value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::Iterable),
        Expr::Var(name) => names.get(name.id).copied().unwrap_or(false),
        Expr::UnaryOp(_) | Expr::Compare(_) | Expr::Test(_) => true,
        Expr::BinOp(node) => match node.op {
            BinOpKind::ScAnd | BinOpKind::ScOr => scalar(&node.left) && scalar(&node.right),
            // a text or number and a list give an error
            BinOpKind::Add => scalar(&node.left) || scalar(&node.right),
            BinOpKind::Mul => scalar(&node.left) && scalar(&node.right),
            _ => true,
        },
        Expr::IfExpr(node) => scalar(&node.true_expr) && node.false_expr.as_ref().is_none_or(scalar),
        Expr::Filter(node) => {
            let arguments = || node.args.iter().all(|argument| scalar(argument_of(argument)));
            match node.name {
                "default" | "d" => node.expr.as_ref().is_some_and(scalar) && arguments(),
                // these have a default, too
                "int" | "float" => arguments(),
                name => SCALAR_FILTERS.contains(&name),
            }
        }
        Expr::Call(node) => match &node.expr {
            Expr::GetAttr(method) => SCALAR_METHODS.contains(&method.name),
            _ => false,
        },
        Expr::Slice(_) | Expr::GetAttr(_) | Expr::GetItem(_) | Expr::List(_) | Expr::Tuple(_) | Expr::Map(_) => false,
    }
}
