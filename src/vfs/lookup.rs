//! Resolving names: from what is known where that is fresh, from the store where it is not.

use std::ffi::OsStr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::directory::{Entry, Lookup, Name, Way};
use super::error::{VfsError, VfsResult};
use super::file::File;
use super::names;
use super::tree::{CONTROL, CONTROLS, DirectoryNode, Inode, Kind, ROOT, Tree, fixed};
use super::{EntryAttributes, Vfs};
use crate::catalog::{Branch, Item, RootId};
use crate::store::{Location, PageStart, Store};
use crate::tracking::LoggedModel;
use crate::write::Target;

/// The directory of what MLflow knows of a run or model; not listed.
const DOCUMENTS: &str = ".mlflow";
/// Keys asked for when one name is looked up: the object, names that sort between it and the
/// directory of that name, the directory.
const POINT_LOOKUP_KEYS: u32 = 100;

/// A directory inside an artifact root, ready to be asked.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub inode: Inode,
    /// The path of the artifact root below the mount point.
    pub root: Arc<str>,
    pub directory: Arc<DirectoryNode>,
    pub location: Location,
    /// The path below that, without slashes at its ends.
    pub path: String,
}

impl Place {
    /// The prefix of everything in this directory.
    pub fn prefix(&self) -> String {
        let key = self.location.key(&self.path);
        if key.is_empty() {
            key
        } else {
            format!("{key}/")
        }
    }

    /// The key of a name in this directory.
    pub fn key(&self, name: &str) -> String {
        format!("{}{name}", self.prefix())
    }

    /// Where a file of this name is published.
    pub fn target(&self, name: &str) -> Target {
        let separator = if self.path.is_empty() { "" } else { "/" };
        Target {
            store: Arc::clone(&self.location.store),
            key: self.key(name),
            path: format!("{}/{}{separator}{name}", self.root, self.path),
        }
    }
}

/// Some stores can only be read.
pub(super) fn check_store(store: &Arc<dyn Store>) -> VfsResult<()> {
    if store.capabilities().read_only {
        Err(VfsError::READ_ONLY)
    } else {
        Ok(())
    }
}

impl Vfs {
    /// Finds `name` in `parent` and counts a lookup of it.
    pub async fn lookup(&self, parent: Inode, name: &OsStr) -> VfsResult<EntryAttributes> {
        let name = names::from_kernel(name)?;
        loop {
            let (inode, believed) = self.resolve(parent, name).await?;
            let mut tree = self.tree.lock();
            tree.add_lookup(inode);
            // The kernel may have forgotten meanwhile what it had looked up before.
            if let Some(node) = tree.get(inode) {
                return Ok(self.describe(inode, node, believed));
            }
        }
    }

    /// The inode of `name` in `parent`, and for how long it may be believed.
    pub(super) async fn resolve(&self, parent: Inode, name: &str) -> VfsResult<(Inode, Duration)> {
        let ttl = self.options.metadata_ttl;
        match (parent, name) {
            (CONTROL, _) => {
                let inode = control_node(name).ok_or(VfsError::NOT_FOUND)?;
                return Ok((inode, ttl));
            }
            (ROOT, _) => {
                if let Some(inode) = fixed(name) {
                    return Ok((inode, ttl));
                }
                // A model's id is found where models are.
                if LoggedModel::is_id(name) {
                    return Err(VfsError::NOT_FOUND);
                }
                let run = self.catalog.root_entry(&RootId::run(name)).await?;
                let item = Item::Root(run);
                return Ok((item_node(&mut self.tree.lock(), parent, name, &item), ttl));
            }
            _ => {}
        }
        match self.way_on(parent)? {
            WayOn::Branch(branch) => {
                let item = self.catalog.find(&branch, name).await?;
                return Ok((item_node(&mut self.tree.lock(), parent, name, &item), ttl));
            }
            WayOn::Documents(id) => {
                let kind = document(&id, name).ok_or(VfsError::NOT_FOUND)?;
                return Ok((catalog_node(&mut self.tree.lock(), parent, name, kind), ttl));
            }
            WayOn::Run(id) | WayOn::Model(id) if name == DOCUMENTS => {
                let kind = Kind::Documents(id);
                return Ok((catalog_node(&mut self.tree.lock(), parent, name, kind), ttl));
            }
            WayOn::Run(id) => {
                let run_id = id.name();
                let models = self.catalog.models_of_run(run_id).await;
                let model = models.iter().find(|(model, _)| **model == *name);
                if let Some((_, item)) = model {
                    return Ok((item_node(&mut self.tree.lock(), parent, name, item), ttl));
                }
            }
            WayOn::Model(_) | WayOn::Store => {}
        }
        let place = self.place(parent).await?;
        let begun = Instant::now();
        let mut found = place.directory.names.lock().lookup(name, ttl);
        if found == Lookup::Unknown {
            // To ask for a name that is only here would be in vain.
            if let Some(inode) = local_child(&self.tree.lock(), parent, name)? {
                return Ok((inode, ttl));
            }
            found = self.ask(&place, name).await?;
        }
        let mut tree = self.tree.lock();
        // What is only here matters where the store is not known to have the directory; to look for
        // it may mean to look at all that is below.
        if !matches!(found, Lookup::Found(Entry::Directory, _))
            && let Some(inode) = local_child(&tree, parent, name)?
        {
            return Ok((inode, ttl));
        }
        // What is not unpublished any more was told to the directory before.
        let newer = place.directory.names.lock().since(name, begun);
        if newer != Lookup::Unknown {
            found = newer;
        }
        match found {
            Lookup::Found(entry, at) => {
                let believed = ttl.saturating_sub(at.elapsed());
                let inode = store_node(&mut tree, parent, name.into(), &entry);
                Ok((inode, believed))
            }
            Lookup::Absent | Lookup::Unknown => {
                tree.unlink(parent, name);
                Err(VfsError::NOT_FOUND)
            }
        }
    }

    /// Opens the location of a directory that is about to be changed.
    pub(super) async fn writable_place(&self, inode: Inode) -> VfsResult<Place> {
        self.check_writable()?;
        let place = self.place(inode).await?;
        check_store(&place.location.store)?;
        Ok(place)
    }

    /// Who is asked for names in a directory.
    fn way_on(&self, inode: Inode) -> VfsResult<WayOn> {
        let tree = self.tree.lock();
        let node = tree.get(inode).ok_or(VfsError::STALE)?;
        Ok(match &node.kind {
            Kind::Branch(branch) => WayOn::Branch(branch.clone()),
            Kind::Documents(id) => WayOn::Documents(id.clone()),
            Kind::Artifacts(root, _) => match &root.id {
                RootId::Run(_) => WayOn::Run(root.id.clone()),
                RootId::Model(_) => WayOn::Model(root.id.clone()),
                RootId::Version { .. } => WayOn::Store,
            },
            _ => WayOn::Store,
        })
    }

    /// The target of a symbolic link.
    pub fn read_link(&self, inode: Inode) -> VfsResult<Name> {
        let tree = self.tree.lock();
        match &tree.get(inode).ok_or(VfsError::STALE)?.kind {
            Kind::Link(target) => Ok(Arc::clone(target)),
            _ => Err(VfsError::plain(libc::EINVAL)),
        }
    }

    /// Opens a directory's location.
    pub(super) async fn place(&self, inode: Inode) -> VfsResult<Place> {
        let (root, id, below, known, path, directory) = {
            let tree = self.tree.lock();
            let node = tree.get(inode).ok_or(VfsError::STALE)?;
            let directory = match &node.kind {
                Kind::Artifacts(_, directory) | Kind::Directory(directory) => Arc::clone(directory),
                Kind::File(_)
                | Kind::Link(_)
                | Kind::Document(..)
                | Kind::Status
                | Kind::Order(_) => {
                    return Err(VfsError::NOT_DIRECTORY);
                }
                Kind::Root | Kind::Control | Kind::Branch(_) | Kind::Documents(_) => {
                    return Err(VfsError::NOT_PERMITTED);
                }
            };
            let (root, path) = tree.place(inode).ok_or(VfsError::STALE)?;
            let below = Arc::from(tree.path(root));
            let node = tree.get(root).ok_or(VfsError::STALE)?;
            let Kind::Artifacts(entry, _) = &node.kind else {
                return Err(VfsError::STALE);
            };
            let (id, known) = (entry.id.clone(), node.location.clone());
            (root, id, below, known, path, directory)
        };
        let location = match known {
            Some(location) => location,
            None => {
                let opened = self.catalog.root(&id).await?;
                if let Some(node) = self.tree.lock().get_mut(root) {
                    node.location = Some(opened.location.clone());
                }
                opened.location.clone()
            }
        };
        Ok(Place {
            inode,
            root: below,
            directory,
            location,
            path,
        })
    }

    /// Asks the store for one name: with the whole directory where that is one page and will be
    /// believed, singly where not.
    async fn ask(&self, place: &Place, name: &str) -> VfsResult<Lookup> {
        let ttl = self.options.metadata_ttl;
        if !ttl.is_zero() {
            let _gate = place.directory.gate.lock().await;
            let known = place.directory.names.lock().lookup(name, ttl);
            if known != Lookup::Unknown {
                return Ok(known);
            }
            let way = place.directory.names.lock().way_to_ask(name, ttl);
            let found = match way {
                Way::First => self.ask_page(place, name).await?,
                Way::Around => self.ask_around(place, name).await?,
                Way::Single => Lookup::Unknown,
            };
            if found != Lookup::Unknown {
                return Ok(found);
            }
        }
        self.ask_point(place, name).await
    }

    async fn ask_page(&self, place: &Place, name: &str) -> VfsResult<Lookup> {
        let listing = self.begin_listing(place);
        let page = listing.page(PageStart::First).await?;
        let mut names = place.directory.names.lock();
        match page.next {
            None => names.note_complete(listing.begun),
            Some(_) => names.note_large(listing.begun),
        }
        let found = names.since(name, listing.begun);
        drop(names);
        Ok(found)
    }

    /// Asks for the page that begins at a name: whoever looks at one after the other has the next
    /// ones too.
    async fn ask_around(&self, place: &Place, name: &str) -> VfsResult<Lookup> {
        let listing = self.begin_listing(place);
        let before = just_before(&place.key(name));
        listing.page(PageStart::After(&before)).await?;
        let mut names = place.directory.names.lock();
        let found = names.since(name, listing.begun);
        if found == Lookup::Unknown {
            names.asked_in_vain();
        }
        drop(names);
        Ok(found)
    }

    async fn ask_point(&self, place: &Place, name: &str) -> VfsResult<Lookup> {
        let key = place.key(name);
        let below = format!("{key}/");
        let begun = Instant::now();
        let store = &place.location.store;
        let page = store
            .list(&key, true, PageStart::First, Some(POINT_LOOKUP_KEYS))
            .await?;
        let passed = page.objects.iter().any(|object| object.key > below)
            || page
                .prefixes
                .iter()
                .any(|prefix| prefix.as_str() >= below.as_str());
        let listed = names::entries(&place.prefix(), page.objects, &page.prefixes);
        let mut entry = listed
            .into_iter()
            .find_map(|(listed, entry)| (*listed == *name).then_some(entry));
        if page.next.is_some() && !passed && entry != Some(Entry::Directory) {
            let page = store.list(&below, true, PageStart::First, Some(1)).await?;
            if !page.objects.is_empty() || !page.prefixes.is_empty() {
                entry = Some(Entry::Directory);
            }
        }
        let mut names = place.directory.names.lock();
        names.note(name, entry, begun, self.options.metadata_ttl);
        Ok(names.since(name, begun))
    }
}

/// Who is asked for a name.
enum WayOn {
    Branch(Branch),
    Documents(RootId),
    /// The store; but the models of this run come first, and what is known of it.
    Run(RootId),
    /// The store; but what is known of this model comes first.
    Model(RootId),
    Store,
}

/// A child that counts whatever the store says: unpublished, or a local directory.
fn local_child(tree: &Tree, parent: Inode, name: &str) -> VfsResult<Option<Inode>> {
    let node = tree.get(parent).ok_or(VfsError::STALE)?;
    if !node.is_directory() {
        return Err(VfsError::NOT_DIRECTORY);
    }
    let child = tree.child(parent, name);
    Ok(child.and_then(|(inode, node)| match &node.kind {
        Kind::File(file) => file.is_dirty().then_some(inode),
        Kind::Directory(_) => exists_locally(tree, inode).then_some(inode),
        _ => None,
    }))
}

/// The node of something a listing showed, and since when it is known to be so; `None` if it is gone.
pub(super) fn listed_node(
    tree: &mut Tree,
    parent: Inode,
    listed: &super::Listed,
) -> Option<(Inode, Instant)> {
    if parent == CONTROL
        && let Some(inode) = control_node(&listed.name)
    {
        return Some((inode, listed.at));
    }
    if parent == ROOT
        && let Some(inode) = fixed(&listed.name)
    {
        return Some((inode, listed.at));
    }
    if let Some(Kind::Documents(id)) = tree.get(parent).map(|node| &node.kind) {
        let kind = document(id, &listed.name)?;
        return Some((catalog_node(tree, parent, &listed.name, kind), listed.at));
    }
    if let Some(item) = &listed.item {
        return Some((item_node(tree, parent, &listed.name, item), listed.at));
    }
    let local = tree.child(parent, &listed.name).and_then(|(inode, node)| {
        let counts = match (&node.kind, &listed.entry) {
            (Kind::File(file), _) => file.is_dirty(),
            // The same directory, also if the store has nothing in it.
            (_, Entry::Directory) => true,
            _ => exists_locally(tree, inode),
        };
        counts.then_some((inode, listed.at))
    });
    if local.is_some() {
        return local;
    }
    // The listing may be older than what was done here since.
    let (entry, at) = match tree.get(parent).map(|node| &node.kind) {
        Some(Kind::Artifacts(_, directory) | Kind::Directory(directory)) => {
            match directory.names.lock().since(&listed.name, listed.at) {
                Lookup::Found(entry, at) => (entry, at),
                Lookup::Absent => return None,
                Lookup::Unknown => (listed.entry.clone(), listed.at),
            }
        }
        _ => (listed.entry.clone(), listed.at),
    };
    let inode = store_node(tree, parent, Arc::clone(&listed.name), &entry);
    Some((inode, at))
}

/// The inode of a file in `.mlfs`.
fn control_node(name: &str) -> Option<Inode> {
    let mut controls = CONTROLS.into_iter();
    controls.find_map(|(control, inode, _)| (control == name).then_some(inode))
}

/// A key, perhaps of nothing, that comes before `key` with little between them.
fn just_before(key: &str) -> String {
    let mut letters = key.chars();
    let last = letters.next_back();
    let mut before = letters.as_str().to_owned();
    if let Some(last @ '1'..='~') = last {
        before.push(char::from(last as u8 - 1));
        before.push('~');
    }
    before
}

/// A directory that is there although the store may have nothing in it.
pub(super) fn exists_locally(tree: &Tree, inode: Inode) -> bool {
    let Some(node) = tree.get(inode) else {
        return false;
    };
    if node.local {
        return true;
    }
    node.children
        .values()
        .any(|child| match tree.get(*child).map(|node| &node.kind) {
            Some(Kind::File(file)) => file.is_dirty(),
            Some(Kind::Directory(_)) => exists_locally(tree, *child),
            _ => false,
        })
}

/// The inode of what the catalog has under a name.
pub(super) fn item_node(tree: &mut Tree, parent: Inode, name: &str, item: &Item) -> Inode {
    let (kind, modified) = match item {
        Item::Branch(branch, modified) => (Kind::Branch(branch.clone()), *modified),
        Item::Link(target, modified) => (Kind::Link(Arc::clone(target)), *modified),
        Item::Root(root) => (Kind::Artifacts(root.clone(), Arc::default()), root.modified),
    };
    let known = tree.child(parent, name);
    let same = known.filter(|(_, node)| match (&node.kind, &kind) {
        (Kind::Branch(one), Kind::Branch(other)) => one == other,
        (Kind::Link(one), Kind::Link(other)) => one == other,
        (Kind::Artifacts(one, _), Kind::Artifacts(other, _)) => one.id == other.id,
        _ => false,
    });
    let Some((inode, _)) = same else {
        return tree.insert(parent, name, kind, modified);
    };
    if let Some(node) = tree.get_mut(inode) {
        node.modified = modified;
        if let (Kind::Artifacts(known, _), Item::Root(root)) = (&mut node.kind, item) {
            *known = root.clone();
        }
    }
    inode
}

/// A file of what is known of a run or model, if there is one of that name.
fn document(id: &RootId, name: &str) -> Option<Kind> {
    let mut documents = id.documents().iter();
    let found = documents.find(|(known, _)| *known == name);
    found.map(|(_, document)| Kind::Document(id.clone(), *document))
}

/// The inode of what is known of a run or model.
fn catalog_node(tree: &mut Tree, parent: Inode, name: &str, kind: Kind) -> Inode {
    match tree.child(parent, name) {
        Some((inode, node)) if matches!(node.kind, Kind::Documents(_) | Kind::Document(..)) => {
            inode
        }
        _ => {
            let modified = containing_time(tree, parent);
            tree.insert(parent, name, kind, modified)
        }
    }
}

fn store_node(tree: &mut Tree, parent: Inode, name: Name, entry: &Entry) -> Inode {
    if let Some((inode, node)) = tree.child(parent, &name) {
        match (&node.kind, entry) {
            (Kind::Directory(_), Entry::Directory) => return inode,
            (Kind::File(file), Entry::File(info)) => {
                let mut state = file.state();
                if state.is_dirty() {
                    return inode;
                }
                let same = state
                    .published
                    .as_ref()
                    .is_some_and(|known| known.size == info.size && known.etag == info.etag);
                if same {
                    return inode;
                }
                // Somebody else wrote a new version. Who has the old one open keeps it, under an
                // inode of its own, so that the kernel's pages of the two never meet.
                if state.handles == 0 && state.kernel_version.is_none() {
                    state.published = Some(info.clone());
                    state.modified = None;
                    state.reader = None;
                    return inode;
                }
            }
            _ => {}
        }
    }
    let modified = match entry {
        Entry::File(info) => info.modified,
        Entry::Directory => containing_time(tree, parent),
    };
    let kind = match entry {
        Entry::File(info) => Kind::File(File::new(Some(info.clone()))),
        Entry::Directory => Kind::Directory(Arc::default()),
    };
    tree.insert(parent, name, kind, modified)
}

/// Stores keep no time for directories: they show that of the run.
fn containing_time(tree: &Tree, parent: Inode) -> SystemTime {
    match tree.get(parent).map(|node| (&node.kind, node.modified)) {
        Some((Kind::Artifacts(root, _), _)) => root.modified,
        Some((_, modified)) => modified,
        None => SystemTime::UNIX_EPOCH,
    }
}
